"""The worker's side of `measure`; it runs in the peer's environment too."""

import json
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
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"rate": work / seconds, "peak_mb": kilobytes / 1024}), flush=True)
