"""The worker's side of `measure`; it runs in the peer's environment too."""

import json
import os
import pathlib
import resource
import sys
import time


def serve(do_round):
    """The worker's side: does rounds until its input ends.

    Args:
      do_round: function that does the work and returns how much of it there was (images,
        steps).
    """
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        work = do_round()
        seconds = time.perf_counter() - begin
        print(json.dumps({"rate": work / seconds, "peak_mb": peak_mb()}), flush=True)


def peak_mb():
    """The most memory that this process had, and its children beyond what they share.

    Those of now, each at its own worst time; where there is no /proc, without them.
    """
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            status = _numbers(process / "status")
            if status["PPid:"] == os.getpid():
                now = _numbers(process / "smaps_rollup")
                kilobytes += status["VmHWM:"] - now["Shared_Clean:"] - now["Shared_Dirty:"]
        except (OSError, KeyError):
            pass  # it has ended
    return kilobytes / 1024


def _numbers(path):
    """The first number of each line, by what stands before it."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if words[1:] and words[1].isdigit()}
