"""The words of a ladder, in English and Ukrainian: the reason of each decision, and the verdict in one sentence."""

from collections.abc import Mapping
from typing import Any, Final

TEXTS: Final[dict[str, dict[str, str]]] = {
    "en": {
        "heading": "The ladder",
        "changed": "changed the held-out loss by {value} (95%: {low} to {high})",
        "for_more": " for {times}x the parameters",
        "priced": ", less than its price of {price}",
        "climb": "{to} pays: it {changed} against {rung} in the same {steps} steps{for_more}.",
        "passed": " {name} alone did not: it {changed}.",
        "stay": "{rung} was enough: {tried}.",
        "open": "Chance leaves open whether {rung} is enough: {tried}. Another look follows at step {again}.",
        "tried": "{name} {changed}{for_more}{priced}",
        "failed": "{name} could not be trained ({failure})",
        "failed_alone": " {name} could not be trained ({failure}).",
        "confirmed": "{rung} is confirmed: {steps} steps on, it {changed} against {to} where that was left.",
        "back": "Back to {to}: {steps} steps on, {rung} {changed} against {to} where that was left, which is no gain.",
        "chosen": "The adapter kept is that of the rung {chosen}.",
        "rung": "rung",
        "parameters": "parameters",
        "steps": "steps",
        "step_seconds": "s/step",
        "memory": "memory",
        "change": "change in held-out loss (95%)",
        "step": "step",
        "decision": "decision",
        "test": "Loss on {rows} rows that no decision saw: {base} base, {first}{final} now (95%: {low} to {high}).",
        "test_first": "{loss} {rung} when it was left, ",
        "rows": "Of the held-out rows, {validation} decided and {test} others tested the result, chosen by a hash "
        "of their content. Each trial's arms train the same {trial} steps on the same rows from the same state.",
        "rows_together": "Of the held-out rows, {validation} decided and {test} others tested the result, chosen by a "
        "hash of their content.",
        "cost": "Off the final path: {steps} of {all} steps trained, {seconds} s.",
        "figure": "Held-out loss after each trial, against the size of the adapter",
        "figure_note": "Each line joins the arms of one trial: the same steps on the same rows. Further right are more "
        "parameters, in doublings of the first rung's; whiskers are 95% intervals over rows.",
        "doublings": "doublings",
        "interval": "{value} ({low} to {high})",
        "trial_at": "trial at step {step}",
        "together": "Configurations trained at the same time",
        "halving": "{kept} go on. Dropped, with held-out losses above that of {best}: {dropped}.",
        "is_dropped": "{name} by {more} (95%: {low} to {high})",
        "has_failed": "{names} failed and is dropped: {failure}.",
        "best": "{name} is the best of {num} configurations: held-out loss {loss} (95%: {low} to {high}); {second}",
        "second": "{name}, the next of those trained to the end, is {more} above it (95%: {low} to {high}).",
        "only": "the only one trained to the end.",
        "configuration": "configuration",
        "held_out": "held-out loss (95%)",
        "dropped": "dropped at",
        "above": "above the best (95%)",
        "failed_at": "{step}, failed",
        "lost_at": "{step}",
        "for_all": "All saw the same rows in the same order, and each ends where it would have ended alone. {steps} "
        "steps of all of them together took {seconds} s; the best one alone has {num_steps}.",
        "by_size": "Best held-out loss of each configuration, against the size of its adapter",
        "by_size_note": "Further right are more parameters, in doublings of the smallest adapter's; whiskers are 95% "
        "intervals over rows. Those dropped early have learnt less than they would have in a whole run.",
        "to_the_end": "trained to the end",
        "dropped_early": "dropped",
        "kept": "Kept is the adapter of {chosen}; those of {others} are in configurations/.",
    },
    "uk": {
        "heading": "Драбина",
        "changed": "змінює втрати на відкладених рядках на {value} (95%: від {low} до {high})",
        "for_more": ", параметрів більше в {times} раза",
        "priced": ", а це менше за її ціну {price}",
        "climb": "{to} окупається: {changed} проти {rung} за ті самі кроки ({steps}){for_more}.",
        "passed": " Сам рівень {name} не окупився: {changed}.",
        "stay": "Рівня {rung} досить: {tried}.",
        "open": "Чи досить рівня {rung}, ще не ясно, різниця в межах випадковості: {tried}. Наступна перевірка: "
        "крок {again}.",
        "tried": "{name} {changed}{for_more}{priced}",
        "failed": "{name} не вдалося навчити ({failure})",
        "failed_alone": " {name} не вдалося навчити ({failure}).",
        "confirmed": "{rung} підтверджено: ще через {steps} кроків {changed} проти {to} на момент переходу.",
        "back": "Назад до {to}: ще через {steps} кроків {rung} {changed} проти {to} на момент переходу, тож виграшу "
        "немає.",
        "chosen": "Збережено адаптер рівня {chosen}.",
        "rung": "рівень",
        "parameters": "параметри",
        "steps": "кроки",
        "step_seconds": "с/крок",
        "memory": "пам'ять",
        "change": "зміна втрат на відкладених рядках (95%)",
        "step": "крок",
        "decision": "рішення",
        "test": "Втрати на рядках, яких не бачило жодне рішення ({rows}): {base} базова модель, {first}{final} тепер "
        "(95%: від {low} до {high}).",
        "test_first": "{loss} рівень {rung} на момент переходу, ",
        "rows": "З відкладених рядків {validation} вирішували, а {test} інших перевіряли результат; розподіл за хешем "
        "вмісту. В кожній пробі обидві сторони проходять ті самі кроки ({trial}) на тих самих рядках з одного стану.",
        "rows_together": "З відкладених рядків {validation} вирішували, а {test} інших перевіряли результат; розподіл "
        "за хешем вмісту.",
        "cost": "Поза остаточним шляхом: {steps} із {all} пройдених кроків, {seconds} с.",
        "figure": "Втрати на відкладених рядках після кожної проби залежно від розміру адаптера",
        "figure_note": "Кожна лінія з'єднує сторони однієї проби: ті самі кроки на тих самих рядках. Праворуч більше "
        "параметрів, у подвоєннях від першого рівня; вуса: 95% інтервали за рядками.",
        "doublings": "подвоєння",
        "interval": "{value} (від {low} до {high})",
        "trial_at": "проба на кроці {step}",
        "together": "Конфігурації, навчені одночасно",
        "halving": "Далі йдуть {kept}. Відкинуто, бо втрати на відкладених рядках більші, ніж у {best}: {dropped}.",
        "is_dropped": "{name} на {more} (95%: від {low} до {high})",
        "has_failed": "{names}: навчання не вдалося, відкинуто: {failure}.",
        "best": "Найкраща з конфігурацій ({num}): {name}, втрати на відкладених рядках {loss} (95%: від {low} до "
        "{high}); {second}",
        "second": "наступна з навчених до кінця, {name}, має на {more} більше (95%: від {low} до {high}).",
        "only": "лише її навчено до кінця.",
        "configuration": "конфігурація",
        "held_out": "втрати на відкладених рядках (95%)",
        "dropped": "відкинуто на кроці",
        "above": "більше за найкращу на (95%)",
        "failed_at": "{step}, не вдалося",
        "lost_at": "{step}",
        "for_all": "Усі бачили ті самі рядки в тому самому порядку, і кожна закінчує там, де закінчила б сама. Кроків "
        "усіх разом: {steps}, за {seconds} с; у найкращої самої їх {num_steps}.",
        "by_size": "Найкращі втрати кожної конфігурації залежно від розміру її адаптера",
        "by_size_note": "Праворуч більше параметрів, у подвоєннях від найменшого адаптера; вуса: 95% інтервали за "
        "рядками. Відкинуті рано навчилися меншого, ніж навчилися б за цілий прогін.",
        "to_the_end": "навчено до кінця",
        "dropped_early": "відкинуто",
        "kept": "Збережено адаптер {chosen}; адаптери {others} лежать у configurations/.",
    },
}


def why(decision: Mapping[str, Any], language: str = "en") -> str:
    """Returns the reason of a decision in one sentence."""
    text = TEXTS[language]
    if "dropped" in decision:
        return _why_dropped(decision, text)
    if "arms" not in decision:
        return text[decision["kind"]].format(**decision, changed=_changed(decision["difference"], text))
    lower, *tried = decision["arms"]
    if decision["kind"] in ("stay", "open"):
        parts = [_tried(lower, arm, text) for arm in tried]
        return text[decision["kind"]].format(rung=lower["rung"], tried="; ".join(parts), again=decision.get("again"))
    *passed, best = tried
    whole = text["climb"].format(
        to=best["rung"],
        rung=lower["rung"],
        changed=_changed(best["difference"], text),
        for_more=_for_more(lower, best, text),
        steps=decision["steps"],
    )
    return whole + "".join(_passed(arm, text) for arm in passed)


def verdict(record: Mapping[str, Any], language: str = "en") -> str:
    """Returns what a ladder came to: the reason of its last decision to climb, stay or go back."""
    last = [each for each in record["decisions"] if each["kind"] != "confirmed"][-1]
    return why(last, language)


def _why_dropped(decision: Mapping[str, Any], text: Mapping[str, str]) -> str:
    best, dropped = decision["kept"][0], decision["dropped"]
    if decision["kind"] == "failed":
        names, failure = ", ".join(each["name"] for each in dropped), dropped[0]["failure"].rstrip(".")
        return text["has_failed"].format(names=names, failure=failure)
    parts = [text["is_dropped"].format(**_more(each)) for each in dropped]
    return text["halving"].format(kept=", ".join(decision["kept"]), best=best, dropped="; ".join(parts))


def _more(figures: Mapping[str, Any]) -> dict[str, str]:
    difference = _signed(figures["difference"])
    return {**difference, "name": figures["name"], "more": difference["value"].removeprefix("+")}


def best_of(record: Mapping[str, Any], language: str = "en") -> str:
    """Returns which of many configurations was the best, and by how much, in one sentence."""
    text, all_of_them = TEXTS[language], record["configurations"]
    best = next(each for each in all_of_them if each["name"] == record["chosen"])
    others = [each for each in all_of_them if each["name"] in record["survivors"] and each is not best]
    second = min(others, key=lambda each: each["loss"], default=None)
    return text["best"].format(
        name=best["name"],
        num=len(all_of_them),
        **{name: f"{best[name]:.4f}" for name in ("loss", "low", "high")},
        second=text["only"] if second is None else text["second"].format(**_more(second)),
    )


def losses_on_test_rows(record: Mapping[str, Any], language: str = "en") -> str:
    """Returns the losses on the test rows."""
    text, test = TEXTS[language], record["test"]
    first = test.get("first")
    left = text["test_first"].format(loss=f"{first['loss']:.4f}", rung=record["rungs"][0]["name"]) if first else ""
    final = {name: f"{test['final'][name]:.4f}" for name in ("low", "high")}
    losses = {"base": f"{test['base']['loss']:.4f}", "final": f"{test['final']['loss']:.4f}"}
    return text["test"].format(rows=record["test_rows"], first=left, **losses, **final)


def change(difference: Mapping[str, float], language: str = "en") -> str:
    """Returns a paired difference with its interval: -0.0021 (-0.0093 to +0.0041)."""
    return TEXTS[language]["interval"].format(**_signed(difference))


def _changed(difference: Mapping[str, float], text: Mapping[str, str]) -> str:
    return text["changed"].format(**_signed(difference))


def _signed(difference: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:+.4f}" for name, value in difference.items()}


def _for_more(lower: Mapping[str, Any], arm: Mapping[str, Any], text: Mapping[str, str]) -> str:
    return text["for_more"].format(times=f"{arm['parameters'] / lower['parameters']:.1f}")


def _tried(lower: Mapping[str, Any], arm: Mapping[str, Any], text: Mapping[str, str]) -> str:
    if "failure" in arm:
        return text["failed"].format(name=arm["rung"], failure=arm["failure"])
    real = arm["difference"]["high"] < 0
    return text["tried"].format(
        name=arm["rung"],
        changed=_changed(arm["difference"], text),
        for_more=_for_more(lower, arm, text),
        priced=text["priced"].format(price=f"{arm['price']:.4f}") if real else "",
    )


def _passed(arm: Mapping[str, Any], text: Mapping[str, str]) -> str:
    if "failure" in arm:
        return text["failed_alone"].format(name=arm["rung"], failure=arm["failure"])
    return text["passed"].format(name=arm["rung"], changed=_changed(arm["difference"], text))
