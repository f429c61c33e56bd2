"""`loratune explain`: what LoRA is and what its settings do, in words and in the numbers of your own model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.options import AsJson, Lang, print_json
from loratune.language import language as system_language

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from loratune.explain import facts
    from loratune.explain.skeleton import Skeleton
    from loratune.explain.texts import Numbers

_MAX_WIDTH = 120  # wider, the eye loses the line
_MAX_CELL = 3  # columns for one layer of the map
_REACHED = {"fast": ("█", "green"), "quality": ("▓", "cyan"), "deep": ("░", "magenta"), None: ("·", "dim")}


def explain(
    topic: Annotated[
        str | None,
        typer.Argument(metavar="TOPIC", help="A parameter, role or preset: r, value, deep ...", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Show it on this model: folder, hub id or GGUF file."),
    ] = None,
    lang: Lang = None,
    as_json: AsJson = False,
) -> int:
    """Explain LoRA, its parameters, roles and presets; with --model in that model's numbers, without loading it."""
    from rich.console import Console

    from loratune.explain import texts

    language = lang.value if lang else system_language()
    topic = None if topic is None else texts.find_topic(topic)
    words = texts.cleaned(texts.LANGUAGES[language])
    console = Console(stderr=as_json)
    console.width = min(console.width, _MAX_WIDTH)
    page = _Page(console, words, texts.Numbers(words))
    bones = None if model is None else _skeleton(model, page)
    if as_json:
        print_json(_report(topic, language, words, bones))
    elif topic is not None:
        _show_topic(page, topic, bones)
    elif bones is not None:
        _show_model(page, bones)
    else:
        _show_all(page)
    return 0


def _skeleton(model: str, page: "_Page") -> "Skeleton":
    from loratune.explain.skeleton import skeleton

    return skeleton(model, lambda message: page.say(message, style="dim"))


def _report(topic: str | None, language: str, words: dict[str, Any], bones: "Skeleton | None") -> dict[str, Any]:
    report: dict[str, Any] = {"language": language, "topic": topic}
    if topic is not None:
        report["text"] = words["topics"][topic]
    elif bones is None:
        report["text"] = {name: words[name] for name in ("intro", "advice", "topics")}
    if bones is not None:
        from loratune.explain import facts

        report["model"] = {"name": bones.name, **facts.report(facts.of(bones.model, bones.dtype), topic)}
    return report


# ---- pages ----------------------------------------------------------------------------------------------------------


def _show_all(page: "_Page") -> None:
    """What LoRA is, and all that can be explained, without a model."""
    from loratune.adapter.roles import PRESET_SETTINGS, PRESETS, ROLES
    from loratune.explain.texts import IDEAS, PARAMETERS, PRESET_NAMES, USUAL_NAMES

    intro, topics, words = page.texts["intro"], page.texts["topics"], page.texts["words"]
    page.heading(intro["title"])
    page.say(intro["what"])
    page.drawing(intro["drawing"])
    page.points(intro["facts"])
    page.say(intro["source"], style="dim", indent=2)
    page.heading(words["roles"])
    roles = ((page.role(role), USUAL_NAMES[role], topics[role]["short"]) for role in ROLES)
    page.table((words["role"], words["usual_name"], words["what"]), roles)
    page.heading(words["parameters"])
    parameters = ((name, topics[name]["short"], topics[name]["usual"]) for name in PARAMETERS)
    page.table((words["parameter"], words["what"], words["usual"]), parameters)
    page.heading(words["presets"])
    page.table(
        (words["preset"], words["role"], "r", "alpha", "dropout", words["when"]),
        (
            (
                name,
                ", ".join(page.role(role) for role in PRESETS[name]),
                *(page.numbers.plain(PRESET_SETTINGS[name][key]) for key in ("r", "lora_alpha", "lora_dropout")),
                topics[name]["short"],
            )
            for name in PRESET_NAMES
        ),
    )
    page.heading(words["advice"])
    page.points(page.texts["advice"], numbered=True)
    page.heading(words["more"])
    page.points(page.texts["commands"].values())
    page.say(f"{words['ideas']}: {', '.join(f'`{idea}`' for idea in IDEAS)}", indent=2)


def _show_model(page: "_Page", bones: "Skeleton") -> None:
    """One model: its layers by role, the map of what the presets reach, and what they cost."""
    from loratune.explain import facts

    words, model = page.texts["words"], facts.of(bones.model, bones.dtype)
    _show_model_line(page, bones, model)
    roles = facts.by_role(model)
    page.heading(words["roles"])
    page.table(
        (words["role"], words["name"], *(f">{words[name]}" for name in ("shape", "layers", "weights"))),
        (_role_row(page, role) for role in roles),
    )
    _show_map(page, facts.coverage(model))
    page.heading(words["presets"])
    costs = facts.presets(model)
    _show_costs(page, costs)
    notes = page.texts["notes"]
    page.say(notes["columns"], style="dim", indent=2)
    for name, is_so in {
        "fused": any(len(own) > 1 for role in roles for own in role.names.values()),
        "untied": len({getattr(each, "merged_bytes", None) for each in costs} - {None}) > 1,
        "experts": facts.has_stacked_experts(model),
    }.items():
        if is_so:
            page.say(notes[name], style="dim", indent=2)
    page.heading(words["more"])
    page.points([page.texts["commands"]["topic_model"].replace("MODEL", bones.name)])


def _show_topic(page: "_Page", topic: str, bones: "Skeleton | None") -> None:
    """One parameter, role, preset or idea, and with a model what its steps cost there."""
    from loratune.explain import texts

    text, words = page.texts["topics"][topic], page.texts["words"]
    page.print(_styled(f"\n{text['title']}", "bold cyan"))
    page.say(text["short"], style="bold")
    page.print("")
    page.say(text["what"])
    page.heading(words[texts.HEADINGS[topic]])
    page.say(text["doubled"])
    if bones is not None:
        _show_steps(page, topic, bones)
    page.heading(words["usual"])
    page.say(text["usual"])
    page.heading(words["evidence"])
    page.points(text["evidence"])


def _show_steps(page: "_Page", topic: str, bones: "Skeleton") -> None:
    from loratune.adapter.roles import ROLES
    from loratune.explain import facts
    from loratune.explain.texts import PRESET_NAMES

    words, model = page.texts["words"], facts.of(bones.model, bones.dtype)
    page.heading(words["on_model"])
    _show_model_line(page, bones, model)
    if topic in ROLES:
        role = next(role for role in facts.by_role(model) if role.role == topic)
        name, shape, layers, _ = _role_row(page, role)[1:]
        page.say(f"{name}  {shape}  {words['layers']}: {layers}" if role.names else words["missing"])
    if steps := facts.doubled(model, topic):
        page.print("")
        _show_costs(page, steps)
        sizes = {step.num_parameters for step in steps if isinstance(step, facts.Cost)}
        notes = ["rest"] * (topic not in (*PRESET_NAMES, "merge")) + ["same"] * (len(sizes) == 1) + ["columns"]
        for name in notes:
            page.say(page.texts["notes"][name], style="dim", indent=2)


def _show_model_line(page: "_Page", bones: "Skeleton", model: "facts.Model") -> None:
    count = page.numbers.count(model.num_parameters)
    dtype = str(bones.dtype).removeprefix("torch.")
    facts = (type(bones.model).__name__, f"{page.texts['words']['num_parameters']}: {count}")
    page.say(f"{bones.name}", style="bold")
    page.say(" · ".join((*facts, f"{page.numbers.size(model.num_bytes)}, {dtype}")))


def _role_row(page: "_Page", role: "facts.Role") -> tuple[str, ...]:
    if not role.names:
        return page.role(role.role), "-", "-", "-", "-"
    fused = page.texts["words"]["fused"]
    names = ", ".join(name + (f" ({fused})" if len(own) > 1 else "") for name, own in role.names.items())
    count = page.numbers.count
    shapes = "\n".join(f"{count(outputs)} × {count(inputs)}" for outputs, inputs, _ in role.shapes[:3])
    more = "\n…" if len(role.shapes) > 3 else ""
    return page.role(role.role), names, shapes + more, count(role.num_layers), count(role.num_weights)


def _show_costs(page: "_Page", costs: "Sequence[facts.Cost | facts.NoCost]") -> None:
    """A row a setting; the scale only where it is what differs."""
    from loratune.explain.facts import NoCost

    words, numbers = page.texts["words"], page.numbers
    scales = {round(each.scale, 6) for each in costs if not isinstance(each, NoCost)}
    rows: list[tuple[str, ...]] = []
    for each in costs:
        if isinstance(each, NoCost):
            rows.append((each.setting, *(() if len(scales) < 2 else ("",)), words["none_here"], *[""] * 5))
            continue
        scale = () if len(scales) < 2 else (numbers.plain(each.scale),)
        sizes = (numbers.size(each.adapter_bytes), numbers.size(each.optimizer_bytes))
        shares = numbers.share(each.share), f"+{numbers.share(each.extra_flops)}"
        trained = numbers.count(each.num_parameters)
        rows.append((each.setting, *scale, trained, shares[0], *sizes, shares[1], numbers.size(each.merged_bytes)))
    heads = ["scale"] * (len(scales) > 1) + ["trained", "share", "adapter_file", "optimizer", "flops", "merged"]
    page.table(("", *(f">{words[name]}" for name in heads)), rows)


# ---- the map --------------------------------------------------------------------------------------------------------


def _show_map(page: "_Page", coverage: "facts.Coverage") -> None:
    """Role by layer: the first preset that reaches each layer."""
    from rich.text import Text

    words = page.texts["words"]
    page.heading(words["map"])
    page.print(Text("  ").append_text(Text("   ").join(_legend())))
    label = max(len(page.role(role)) for role in coverage.reached) + 2
    stacks = list(groups(coverage.layers))
    cells = cell_width(len(coverage.layers), page.console.width - label - 4 - len(stacks))
    page.print(Text(f"  {'':<{label}}{', '.join(_span(coverage.layers[a:b]) for a, b in stacks)}", style="dim"))
    for role, reached in coverage.reached.items():
        line = Text(f"  {page.role(role):<{label}}")
        if role in coverage.outside:
            line.append_text(_cell(coverage.outside[role], 1)).append(f" {words['outside']}", style="dim")
        elif all(preset is None for preset in reached):
            line.append("-", style="dim")
        else:
            line.append_text(Text(" ").join(_row(reached[a:b], cells) for a, b in stacks))
        page.print(line)


def _legend() -> Iterable["Text"]:
    return (_cell(preset, 2).append(f" {preset}", style="default") for preset in _REACHED if preset)


def groups(layers: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Yields (start, end) of the runs of layers that share all but the number: encoder.block.0 to 11, decoder ..."""
    for _, run in groupby(range(len(layers)), key=lambda index: layers[index].rpartition(".")[0]):
        indices = list(run)
        yield indices[0], indices[-1] + 1


def _span(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]}–{layers[-1].rpartition('.')[2]}"


def cell_width(num_layers: int, width: int) -> float:
    """Returns the columns of one layer's cell: 1 to 3, or a part of one where the layers outnumber the columns."""
    if num_layers <= width:
        return min(_MAX_CELL, width // max(1, num_layers))
    return width / num_layers


def _row(reached: Sequence[str | None], cell: float) -> "Text":
    from rich.text import Text

    if cell >= 1:
        return Text(" " if cell >= 2 else "").join(_cell(preset, max(1, int(cell) - 1)) for preset in reached)
    count = max(1, int(len(reached) * cell))
    edges = [index * len(reached) // count for index in range(count + 1)]
    shares = (reached[a:b] for a, b in pairwise(edges))
    return Text().join(_cell(next((preset for preset in own if preset), None), 1) for own in shares)


def _cell(preset: str | None, width: int) -> "Text":
    from rich.text import Text

    sign, style = _REACHED[preset]
    return Text(sign * width, style=style)


# ---- the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    """Where the texts of one language are shown; words in backticks are commands and names."""

    console: "Console"
    texts: dict[str, Any]
    numbers: "Numbers"

    def role(self, role: str) -> str:
        return self.texts["topics"][role]["title"].partition(",")[0]

    def print(self, renderable: Any) -> None:
        self.console.print(renderable, highlight=False)

    def heading(self, text: str) -> None:
        self.print("")
        self.print(_styled(text[0].upper() + text[1:], "bold cyan"))

    def say(self, text: str, style: str = "", indent: int = 0) -> None:
        from rich.padding import Padding

        self.print(Padding(_styled(text, style), (0, 0, 0, indent)))

    def points(self, texts: Iterable[str], numbered: bool = False) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for index, text in enumerate(texts):
            table.add_row(f"  {index + 1}." if numbered else "  ·", _styled(text, ""))
        self.print(table)

    def drawing(self, lines: Iterable[str]) -> None:
        from rich.text import Text

        self.print("")
        for line in lines:
            self.console.print(Text(f"    {line}", style="cyan"), highlight=False, soft_wrap=True)
        self.print("")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Shows a table without lines; a column whose heading begins with ">" holds numbers."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", width=0)
        for index, name in enumerate(columns):
            number = name.startswith(">")
            table.add_column(
                name.removeprefix(">"),
                justify="right" if number else "left",
                header_style="dim",
                no_wrap=number,
                overflow="fold",
                style="bold" if index == 0 else "",
            )
        for row in rows:
            table.add_row("", *(_styled(cell, "") for cell in row))
        self.print(table)


def _styled(text: str, style: str) -> "Text":
    from rich.text import Text

    styled = Text(style=style)
    for index, part in enumerate(text.split("`")):
        styled.append(part, style="cyan" if index % 2 else "")
    return styled
