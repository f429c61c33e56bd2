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
        "cost": "Off the final path: {steps} of {all} steps trained, {seconds} s.",
        "figure": "Held-out loss after each trial, against the size of the adapter",
        "figure_note": "Each line joins the arms of one trial: the same steps on the same rows. Further right are more "
        "parameters, in doublings of the first rung's; whiskers are 95% intervals over rows.",
        "doublings": "doublings",
        "interval": "{value} ({low} to {high})",
        "trial_at": "trial at step {step}",
    },
    "uk": {
        "heading": "Драбина",
        "changed": "змінює втрати на відкладених рядках на {value} (95%: від {low} до {high})",
        "for_more": ", параметрів більше в {times} раза",
        "priced": ", а це менше за її ціну {price}",
        "climb": "{to} окупається: {changed} проти {rung} за ті самі кроки ({steps}){for_more}.",
        "passed": " Сам рівень {name} не окупився: {changed}.",
        "stay": "Рівня {rung} досить: {tried}.",
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
        "cost": "Поза остаточним шляхом: {steps} із {all} пройдених кроків, {seconds} с.",
        "figure": "Втрати на відкладених рядках після кожної проби залежно від розміру адаптера",
        "figure_note": "Кожна лінія з'єднує сторони однієї проби: ті самі кроки на тих самих рядках. Праворуч більше "
        "параметрів, у подвоєннях від першого рівня; вуса: 95% інтервали за рядками.",
        "doublings": "подвоєння",
        "interval": "{value} (від {low} до {high})",
        "trial_at": "проба на кроці {step}",
    },
}


def why(decision: Mapping[str, Any], language: str = "en") -> str:
    """Returns the reason of a decision in one sentence."""
    text = TEXTS[language]
    if "arms" not in decision:
        return text[decision["kind"]].format(**decision, changed=_changed(decision["difference"], text))
    lower, *tried = decision["arms"]
    if decision["kind"] == "stay":
        parts = [_tried(lower, arm, text) for arm in tried]
        return text["stay"].format(rung=lower["rung"], tried="; ".join(parts))
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


def losses_on_test_rows(record: Mapping[str, Any], language: str = "en") -> str:
    """Returns the losses on the test rows."""
    text, test = TEXTS[language], record["test"]
    first = test["first"]
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
