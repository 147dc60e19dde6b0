"""vLLM as a peer of `bench.peers`: a process that loads a model in 8 bits and answers one list of requests a line.

    .vllm/bin/python -P bench/peers/vllm_process.py FOLDER

The environment `.vllm` (`make vllm`) has nothing of Lamina. Requests and answers are JSON lines on stdin and stdout, since
without HTTP vLLM loses nothing to its server.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(sys.argv[1], max_model_len=4096, max_num_seqs=16, enable_prefix_caching=False, dtype="bfloat16")

    def answer(requests: list[dict[str, Any]]) -> dict[str, float]:
        prompts = [{"prompt_token_ids": each["token_ids"]} for each in requests]
        params = [SamplingParams(temperature=0, max_tokens=each["max_tokens"], ignore_eos=True) for each in requests]
        began = time.perf_counter()
        outputs = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line)["requests"])), file=answers, flush=True)


if __name__ == "__main__":
    main()  # vLLM starts processes that import this file
