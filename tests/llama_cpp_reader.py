"""Reads a GGUF file with llama.cpp: a job as JSON on standard input, what it found as JSON on the last line of output.

Needs llama-cpp-python, and nothing of this project: it may run in another environment (LLAMA_CPP_PYTHON names its Python).
"""

import ctypes
import json
import sys

import numpy
from llama_cpp import Llama


def main():
    job = json.load(sys.stdin)
    model = Llama(job["file"], n_ctx=1024, verbose=False, n_threads=1)

    def logits():
        pointer = model._ctx.get_logits()
        return numpy.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (model.n_vocab(),)).copy()

    found = []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        first = now = logits()
        tokens = [int(now.argmax())]
        while len(tokens) < job["new_tokens"] and tokens[-1] != job["eos"]:
            model.eval(tokens[-1:])
            tokens.append(int(logits().argmax()))
        found.append({"logits": first.tolist(), "tokens": tokens})
    text = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    print(json.dumps({"found": found, "text": text}))


main()
