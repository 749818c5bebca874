"""A process with a real vLLM: reads one job a line, answers with one line each.

A job is a JSON object: `model`, `load_format`, `extra` (`model_loader_extra_config`), `prompts` (token ids),
`tensor_parallel_size`, and `reload`: paths (or null for the same one) to reload from, one after another. The
answer has `tokens`, one list a prompt for the first load and each reload, or `error` and `message`; what the
plug-in logged at WARNING in `warnings`; and in `early`, how many tensors the engine got before all files of the
model were complete.

With `break_after` the disk breaks: after so many of headrace's reads the next ones fail (EIO).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, TextIO


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine: Any = None
    tokens = []
    try:
        engine = LLM(
            model=job["model"],
            load_format=job["load_format"],
            model_loader_extra_config=job.get("extra", {}),
            tensor_parallel_size=job.get("tensor_parallel_size", 1),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            skip_tokenizer_init=True,
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        how = SamplingParams(max_tokens=12, temperature=0.0, detokenize=False)

        def generate(llm: Any) -> list[list[int]]:
            return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, how, use_tqdm=False)]

        tokens.append(generate(engine))
        for path in job.get("reload", ()):
            given = {} if path is None else {"weights_path": path}
            engine.collective_rpc("reload_weights", kwargs=given)
            engine.reset_prefix_cache()
            tokens.append(generate(engine))
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()  # what an engine that did not start has left behind
    return {"tokens": tokens}


@contextlib.contextmanager
def counting_early(count: list[int], kept: logging.Handler) -> Iterator[None]:
    """Count what is handed over while a file of the model is not complete, and keep what is logged."""
    from headrace.loader.engines import weights

    module: Any = weights
    real = module.stream

    def stream(source: Any, **how: Any) -> Iterator[Any]:
        # By now vLLM has configured its loggers, which takes handlers off them.
        logging.getLogger("vllm.headrace").addHandler(kept)
        files = [source.open(path) for path in source.paths()]
        try:
            for item in real(source, **how):
                count[0] += any(not file.complete for file in files)
                yield item
        finally:
            for file in files:
                file.close()

    module.stream = stream
    try:
        yield
    finally:
        module.stream = real


@contextlib.contextmanager
def failing_reads(after: int | None) -> Iterator[None]:
    """Make the answer to the reads of headrace's threads EIO, from the one after so many on."""
    if after is None:
        yield
        return
    real, count = os.preadv, [0]

    def preadv(*arguments: Any) -> int:
        if threading.current_thread().name.startswith("headrace-load"):
            count[0] += 1
            if count[0] > after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    os.preadv = preadv
    try:
        yield
    finally:
        os.preadv = real


def main(answers: TextIO) -> None:
    kept = _Kept()
    for line in sys.stdin:
        job = json.loads(line)
        kept.lines.clear()
        early = [0]
        try:
            with failing_reads(job.get("break_after")), counting_early(early, kept):
                answer = run(job)
        except Exception as error:  # noqa: BLE001  (the test looks at it)
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
        answer |= {"warnings": list(kept.lines), "early": early[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # vLLM and its workers print: what they print is not an answer.
    descriptor = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(descriptor, "w") as out:
        main(out)
