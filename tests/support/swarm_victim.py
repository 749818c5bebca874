"""A staging run in a cluster, in a process of its own that a test kills: `python -m support.swarm_victim JSON`."""

from __future__ import annotations

import json
import sys

from support.models import CHUNK, PATIENT

from headrace.cache.cluster import ClusterSettings
from headrace.cache.prepare import StageRequest
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StagingJob, run


def main() -> None:
    task = json.loads(sys.argv[1])
    limits = StagerLimits(span=CHUNK, connections=8, reserve=0)
    request = StageRequest(
        task["reference"], task["root"], "default", chunk=CHUNK, options=PATIENT, limits=limits, workers=1
    )
    run(StagingJob(request, cluster=ClusterSettings.from_json(task["cluster"])))


if __name__ == "__main__":
    main()
