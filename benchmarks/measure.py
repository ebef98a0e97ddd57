"""Measures programs side by side: workers take turns, ratios are of turns next to each other.

A worker is a process that makes itself ready, and then does one round of work for every
line that it reads, so that its compilation and imports are not in the figures and the
machine belongs to one of them at a time.
"""

import functools
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists them as the benchmark's own

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
_SETTLING = 2  # seconds, in which who had the last turn fills its queues again


def define_flags(rounds=None, with_peer=False):
    """The flags that the benchmarks share. Args: rounds: how many by default, None for no turns."""
    if rounds:
        flags.DEFINE_integer("rounds", rounds, "Turns of each.", lower_bound=1)
    flags.DEFINE_bool("write", False, "Put the table into its page below docs/, with its JSON.")
    if with_peer:
        flags.DEFINE_string(
            "peer_python", None, "Interpreter with torch, torchvision and lightly, to compare with."
        )


def run(main):
    """Parses the flags and calls main, without arguments."""

    def checked_main(argv):
        if argv[1:]:
            raise SystemExit(f"error: {argv[1]!r} is not a flag.")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # closes the workers on its way out
        main()

    app.run(checked_main)


class Worker:
    """A process that runs `worker.serve`.

    Args:
      name: in the results.
      command: list of strings, after the interpreter.
      python: the interpreter; by default this one.
      env: more environment variables.
      cores: set of the cores that it may use, or None for all.
    """

    def __init__(self, name, command, python=sys.executable, env=None, cores=None):
        self.name = name
        self.errors = None if os.environ.get("BENCHMARK_DEBUG") else tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, *command],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores) if cores else None,
        )

    def ready(self):
        self.result()

    def round(self):
        self.begin()
        return self.result()

    def begin(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print too
                return json.loads(line)
        reason = "see above"
        if self.errors:
            self.errors.seek(0)
            reason = f"{last_line(self.errors.read())} (BENCHMARK_DEBUG=1 shows all)"
        raise SystemExit(f"error: {self.name} failed: {reason}")

    def close(self):
        self.process.terminate()
        self.process.communicate()  # closes the pipes and waits


class Together:
    """Workers that do their rounds at the same time, as one; the slowest counts."""

    def __init__(self, name, workers):
        self.name = name
        self.workers = workers

    def ready(self):
        for worker in self.workers:
            worker.ready()

    def round(self):
        for worker in self.workers:
            worker.begin()
        results = [worker.result() for worker in self.workers]
        return {
            "rate": min(result["rate"] for result in results),
            "peak_mb": sum(result["peak_mb"] for result in results),
        }

    def close(self):
        for worker in self.workers:
            worker.close()


def take_turns(workers, rounds):
    """Lets every worker do its rounds, in alternation, after one that does not count.

    Args: workers: a list of `Worker`s. rounds: int.

    Returns: dict from the worker's name to a list of what its rounds printed.
    """
    results = {worker.name: [] for worker in workers}
    try:
        for worker in workers:
            worker.ready()
            worker.round()
            print(f"{worker.name}: ready", flush=True)
        for i in range(rounds):
            for worker in workers:
                time.sleep(_SETTLING)
                results[worker.name].append(worker.round())
            print(f"round {i + 1} of {rounds}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return results


def summary(results, than):
    """Of each worker the median rate, its spread, its peak memory and its ratio to one of them.

    Args: results: of `take_turns`. than: the name of the worker to compare with, or None.
    """
    rows = {}
    for name, rounds in results.items():
        rates = [r["rate"] for r in rounds]
        rows[name] = {
            "median": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "peak_mb": max(r["peak_mb"] for r in rounds),
        }
        if than in results and name != than:
            pairs = zip(rates, (r["rate"] for r in results[than]))
            rows[name]["ratio"] = statistics.median(a / b for a, b in pairs)
    return rows


def versions_of(*packages, python=sys.executable):
    """The versions of packages that an interpreter has, by name."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    )
    versions = subprocess.run(
        [python, "-c", code, *packages], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(versions)


def cpu():
    """The processor's name and how many cores this process may use."""
    name = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
        name = fields.get("model name", name)
        name += " with AMX" if "amx_tile" in fields.get("flags", "") else ""
    return f"{name}, {len(cores()) or os.cpu_count()} cores"


def cores():
    """The cores that this process may use, a sorted list; empty where that cannot be said."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def peer_python():
    """The interpreter of --peer_python, or this one, if it can run the peer; else None."""
    python = FLAGS.peer_python or sys.executable
    try:
        imports = [python, "-c", "import torch, torchvision, lightly"]
        subprocess.run(imports, capture_output=True, text=True, check=True)
        return python
    except OSError as error:
        reason = error.strerror
    except subprocess.CalledProcessError as error:
        reason = last_line(error.stderr)
    if FLAGS.peer_python:
        raise SystemExit(f"error: --peer_python={python}: {reason}")
    print(f"byol_tf alone is measured: {reason}")
    return None


def last_line(text):
    """What a program said last, where there is more than the reader needs."""
    return (text.strip().splitlines() or ["no message"])[-1]


def ours(name, subject, arguments, **how):
    """A `Worker` of benchmarks/ours.py."""
    return Worker(name, ["-m", "benchmarks.ours", subject, json.dumps(arguments)], **how)


def peer(python, subject, arguments):
    """A `Worker` of benchmarks/peer.py."""
    command = ["-m", "benchmarks.peer", subject, json.dumps(arguments)]
    return Worker("PyTorch and lightly", command, python)


def many_photos(photos, folder, copies=10):
    """A folder with links to so many copies of the photographs, in their class folders."""
    paths = sorted(pathlib.Path(photos).resolve().glob("*/*"))
    if not paths:
        raise SystemExit(f"error: --photos={photos}: no class folders with photographs there.")
    for path in paths:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        for i in range(copies):
            (folder / path.parent.name / f"{i}-{path.name}").symlink_to(path)
    return folder


def report(name, title, unit, parts, peer_python=None):
    """Prints the figures of a benchmark as a table; --write puts it into docs/performance.md.

    Args:
      name: of the JSON file and of the table's place in the page.
      title, unit: of the table; the unit of the rates.
      parts: dict from what was done to rows, of `summary`.
      peer_python: interpreter of the peer, whose versions are noted.
    """
    record = {
        **origin(name, peer_python),
        "title": title,
        "unit": unit,
        "results": parts,
    }
    publish(PAGE, name, record, table(record))


def origin(name, peer_python=None):
    """Where the figures of a benchmark come from: a dict of the command, processor and versions."""
    versions = versions_of("tensorflow", "numpy")
    if peer_python:
        versions |= versions_of("torch", "torchvision", "lightly", python=peer_python)
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": versions,
    }


def publish(page, name, record, table):
    """Prints a table; --write puts it into its place in a page, its record into JSON.

    Args:
      page: path of the Markdown; the JSON is in a folder of the same name beside it.
      name: of the benchmark.
      record: a dict, `origin` included. table: its Markdown.
    """
    print(table)
    if FLAGS.write:
        folder = page.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        _insert(page, name, table)


def table(record):
    """The Markdown of a record of `report`."""
    parts = record["results"]
    compared = [rows for rows in parts.values() if any("ratio" in row for row in rows.values())]
    than = {who for rows in compared for who, row in rows.items() if "ratio" not in row}
    ratio_to = f"ratio to {' or '.join(sorted(than))}" if than else ""
    lines = [
        f"| {record['title']} | {record['unit']}, median | lowest to highest | {ratio_to} "
        "| peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    for part, rows in parts.items():
        for who, row in rows.items():
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            peak = f"{row['peak_mb']:.0f}" if row["peak_mb"] else ""
            lines.append(
                f"| {part}: {who} | {row['median']:.4g} | {row['lowest']:.4g} to "
                f"{row['highest']:.4g} | {ratio} | {peak} |"
            )
    return "\n".join([*lines, "", footer(record)])


def footer(record):
    """The line below a table that says where its figures come from."""
    stack = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"`{record['command']}` on {record['cpu']}; {stack}."


def _insert(page, name, table):
    """Replaces what stands between this benchmark's two marks in the page."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")
