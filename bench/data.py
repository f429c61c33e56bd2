"""Tokenising: rows from a file to a store on disk, beside the tokenizers library's own batch call on the same texts.

    python bench/data.py                      all of it; writes bench/results/data.json and data.md
    python bench/data.py --one SIDE KIND ROWS one side in this process; prints one JSON object

Ours reads the file, checks, renders, tokenises, masks and writes; theirs gets the same texts in memory and does nothing
but `encode_batch_fast`. Both use all cores; what starts once (processes, the tokenizer) counts for neither. Rows: one
to three sentences of UA-GEC, numbered so that none is met twice.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import run as benchmark

MODEL = "google/gemma-3-270m"
KINDS = ("prompt_completion", "text", "messages")
ROWS, MANY_ROWS, REPEATS = 30_000, 1_000_000, 3
BATCH = 4096  # of theirs: 1,024 to 100,000 differ by less than the runs do, and all at once needs 6 KB a row
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
    "else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def pairs(number):
    """Yields (question, answer): one to three sentences as written, then as corrected."""
    from ua_gec import Corpus

    documents = [(d.source_sentences, d.target_sentences) for d in Corpus("train", "gec-fluency")]
    sentences = [(a, b) for sources, targets in documents for a, b in zip(sources, targets) if 20 <= len(a) <= 250]
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(sentences), size=(number, 3)).tolist()
    lengths = generator.integers(1, 4, size=number).tolist()
    for index, (indices, length) in enumerate(zip(chosen, lengths)):
        both = [sentences[i] for i in indices[:length]]
        yield f"{index}. {' '.join(a for a, _ in both)}\n", " ".join(b for _, b in both)


def row(kind, question, answer):
    if kind == "text":
        return {"text": question + answer}
    if kind == "messages":
        said = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": content.strip()} for role, content in said]}
    return {"prompt": question, "completion": answer}


def texts_of(kind, question, answer):
    """What the tokenizer is given for a row, rendered already."""
    if kind == "text":
        return [question + answer]
    if kind == "messages":
        turns = f"<start_of_turn>user\n{question.strip()}<end_of_turn>\n<start_of_turn>model\n{answer.strip()}"
        return [f"<bos>{turns}<end_of_turn>\n"]
    return [question, answer]


def tokenizer_of(kind):
    from loratune.model.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    if kind == "messages":
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def resident():
    """Returns what is resident now, and the most that was, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def theirs(kind, rows):
    backend = tokenizer_of(kind).backend_tokenizer
    texts = (text for pair in pairs(rows) for text in texts_of(kind, *pair))
    seconds, tokens = 0.0, 0
    while batch := list(islice(texts, BATCH)):
        start = time.perf_counter()
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - start
        tokens += sum(map(len, encodings))
    return {"seconds": seconds, "tokens": tokens}


def ours(kind, rows):
    from loratune.data.dataset import load_dataset
    from loratune.data.encode import Encoder

    tokenizer = tokenizer_of(kind)
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder, "rows.jsonl"), Path(folder, "cache")
        with file.open("w", encoding="utf-8") as out:
            for pair in pairs(rows):
                out.write(json.dumps(row(kind, *pair), ensure_ascii=False) + "\n")
        encoder = Encoder(tokenizer, None)
        encoder.prompt([{"role": "user", "content": "a"}])  # starts the process that renders
        before, _ = resident()
        start = time.perf_counter()
        dataset = load_dataset(file, encoder, cache=cache)
        seconds = time.perf_counter() - start
        _, peak = resident()
        start = time.perf_counter()
        again = load_dataset(file, encoder, cache=cache)
        opening = time.perf_counter() - start
        assert (len(again), again.num_tokens) == (rows, dataset.num_tokens)
        stored = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {
        "seconds": seconds,
        "tokens": dataset.num_tokens,
        "start_up_seconds": opening,
        "resident_before_bytes": before,
        "peak_bytes": peak,
        "stored_bytes": stored,
    }


def one(side, kind, rows):
    command = [sys.executable, __file__, "--one", side, kind, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{side} {kind} {rows:,}: {result}", flush=True)
    return result


def measure(kinds, repeats):
    """Runs the sides in turn; what was measured before stays unless it is measured again."""
    path = benchmark.RESULTS / "data.json"
    stored = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    stored["machine"] = benchmark.machine()
    for kind in kinds:
        runs = stored["runs"][kind] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for side in ("ours", "theirs"):
                runs[side].append(one(side, kind, ROWS))
        path.write_text(json.dumps(stored, indent=1) + "\n")
    return path, stored


def table(stored):
    about = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    lines = [
        "# data",
        "",
        f"Median of {REPEATS} (smallest to largest), {ROWS:,} rows, Gemma 3's tokenizer. {about}.",
        "",
        "| rows | ours, s | `encode_batch_fast` alone, s | its speed that ours reaches | start-up, s |",
        "|---|---|---|---|---|",
    ]
    for kind, runs in stored["runs"].items():
        own, other = ([run["seconds"] for run in runs[side]] for side in ("ours", "theirs"))
        ratio = statistics.median(other) / statistics.median(own)
        opening = statistics.median(run["start_up_seconds"] for run in runs["ours"])
        lines.append(f"| {kind} | {spread(own)} | {spread(other)} | {ratio:.2f} | {opening:.2f} |")
    if many := stored.get("many"):
        lines += [
            "",
            f"{MANY_ROWS:,} rows of {many['kind']}, {many['tokens']:,} tokens: {many['seconds']:.0f} s, resident "
            f"{many['resident_before_bytes'] / 1e6:,.0f} MB before and {many['peak_bytes'] / 1e6:,.0f} MB at most, "
            f"{many['stored_bytes'] / 1e6:,.0f} MB stored; start-up on the store {many['start_up_seconds']:.2f} s.",
        ]
    return "\n".join(lines) + "\n"


def spread(seconds):
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "KIND", "ROWS"))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only-many", action="store_true", help="only the run over a million rows")
    parser.add_argument("--few", action="store_true", help="leave out the run over a million rows")
    options = parser.parse_args()
    if options.one:
        side, kind, rows = options.one
        print(json.dumps((ours if side == "ours" else theirs)(kind, int(rows))))
    else:
        kinds = [] if options.only_many else options.kinds.split(",")
        path, stored = measure(kinds, options.repeats)
        if not options.few:
            stored["many"] = {"kind": KINDS[0], **one("ours", KINDS[0], MANY_ROWS)}
            path.write_text(json.dumps(stored, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(stored))
