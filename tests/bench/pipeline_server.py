"""The rival of `make bench-serving`: FastAPI around transformers' pipeline, as one would first write it.

    MODEL=DIR uvicorn tests.bench.pipeline_server:app

Twice, since either is common: a plain function, which FastAPI calls from a pool of threads, and a
coroutine, which computes one request at a time in the event loop.
"""

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

classifier = pipeline("text-classification", model=os.environ["MODEL"], top_k=None, truncation=True)
app = FastAPI()


class Texts(BaseModel):
    inputs: list[str]


@app.post("/threads")
def in_threads(body: Texts) -> dict[str, Any]:
    return {"results": classifier(body.inputs)}


@app.post("/loop")
async def in_the_loop(body: Texts) -> dict[str, Any]:
    return {"results": classifier(body.inputs)}
