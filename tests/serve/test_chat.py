"""Chat on a real Ray Serve and a real vLLM engine on the CPU, asked with OpenAI's own client.

One engine for all tests: starting it is most of the time.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from cluster.ingress import free_port
from lib import events, keys, registry, storage, tracking
from lib.artifacts import ADAPTER_FOLDER, ModelRef, TaskFile
from lib.errors import ModelError, RegistryError
from lib.registry import VERSION_FILE
from lib.settings import ServingSettings, Settings
from lib.tasks import chat
from tests.serve.conftest import key, publish_index, scraped, total

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAME, CONTEXT = "helper", 256
LONG = {"model": NAME, "prompt": "my phone", "max_tokens": 200, "logit_bias": {"1": -100}}
QUESTION = [{"role": "user", "content": "my phone does not ring"}]


def random_chat(base: Path, seed: int) -> Any:
    """A random Llama, 2 layers, as a base's directory with a byte-level tokeniser."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    special = ["<|im_start|>", "<|im_end|>"]
    # Printable ASCII, space and line end: whatever a random model says is text.
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    pieces = {piece: i for i, piece in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's attention on a CPU has heads of 32 and more
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # far from flat, so that the likeliest token is clearly the likeliest
        bos_token_id=0,
        eos_token_id=1,
    )
    fast.save_pretrained(base)
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    return model


def publish(ref: ModelRef, model: Any, base: Path, adapter: Path | None = None) -> ModelRef:
    """A model version as `jobs.promote` registers what `jobs.finetune` exports."""
    info = TaskFile("chat", [], CONTEXT, str(base), f"{ref.name}/0123456789abcdef", chat_template="chatml")
    with storage.publish(ref.uri) as folder:
        chat.save(model, base, info, folder)
        if adapter is not None:
            shutil.copytree(adapter, folder / ADAPTER_FOLDER)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): storage.checksum(str(path)) for path in paths}
        storage.write_json(str(folder / VERSION_FILE), {"files": files})
    return ref


def publish_chat(version: int) -> ModelRef:
    with tempfile.TemporaryDirectory() as base:
        return publish(ModelRef(NAME, version), random_chat(Path(base), version), Path(base))


def publish_adapter(name: str, version: int, base: Path) -> ModelRef:
    """A version that was trained with LoRA: its weights are random, and added to those of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(100 * version + len(name))
    # Without PEFT's usual start at nothing, so that each version says something else.
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        tracking.client().create_model_version(name, source="run")
        return publish(ModelRef(name, version), model.merge_and_unload(), base, Path(adapter))


def crown(ref: ModelRef) -> None:
    tracking.client().create_model_version(NAME, source=ref.uri)
    registry.set_alias(ref, registry.CHAMPION)


def greedy(ref: ModelRef, tokens: int, *before: dict[str, str]) -> str:
    """What transformers says to the question, and what is said before it, with the weights of a version."""
    folder = Path(ref.uri.removeprefix("file://"))
    return greedy_of(folder, folder, tokens, *before)


def greedy_of(weights: Path, tokenizer_of: Path, tokens: int, *before: dict[str, str]) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [*before, *QUESTION], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    text: str = tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def chat_settings(**serving: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": NAME,
            "task": "chat",
            "data": {"source": "nowhere.jsonl"},
            "model": {"base": "nowhere"},
            "serving": {
                "port": free_port(),
                "threads": 1,
                "max_body_bytes": 100_000,
                "max_ongoing_requests": 8,
                "max_queued_requests": 4,
                "chat": {
                    "dtype": "float32",
                    "kv_cache_gib": 0.0625,
                    "max_num_seqs": 8,
                    "options": {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
                },
                **serving,
            },
        }
    )


@dataclass(frozen=True)
class Deployed:
    url: str
    settings: Settings
    ref: ModelRef
    key: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        return httpx.post(self.url + path, headers=headers, timeout=60, **body)

    def ask(self, **rest: Any) -> Any:
        return self.client.chat.completions.create(
            **{"model": NAME, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **rest}
        )


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Deployed]:
    from ray import serve as ray_serve

    from serve.deploy import deploy

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHORL_STORAGE", str(folder))
        patch.setenv("WHORL_DATABASE", f"sqlite:///{folder / 'whorl.db'}")
        tracking.client().create_registered_model(NAME)
        ref = publish_chat(1)
        crown(ref)
        settings = chat_settings()
        yield Deployed(deploy(settings), settings, ref, key())
        engine = engine_processes()
        assert engine
        ray_serve.shutdown()
        _, alive = psutil.wait_procs(engine, timeout=30)
        assert not alive


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes below this one."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.name().startswith("VLLM::")]


def test_the_champion_is_what_answers(deployed: Deployed) -> None:
    answer = deployed.ask()
    assert answer.choices[0].message.content == greedy(deployed.ref, 16)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == NAME
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def test_without_an_engine_it_is_not_ready() -> None:
    from serve.chat import Chat, StartingError
    from serve.http import STARTING

    class Handle:
        up = False

        def running_replicas_populated(self) -> bool:
            return self.up

    handle = Handle()
    ingress = Chat.__new__(Chat)
    ingress._serving, ingress._engines = ServingSettings(), handle
    ingress._ref, ingress._adapters = ModelRef(NAME, 1), None
    with pytest.raises(StartingError, match="the engine is starting") as error:
        ingress.ready()
    assert (error.value.http_status, error.value.code) == (503, STARTING)
    handle.up = True
    assert ingress.ready().version == 1
    handle.up, ingress._serving = False, ServingSettings(min_replicas=0)
    assert ingress.ready().version == 1


def test_a_stream_is_the_same_answer_in_parts(deployed: Deployed) -> None:
    whole = deployed.ask()
    parts = list(deployed.ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert (
        len(parts) > 4
    )  # tokens are sent as they come, not gathered; two that wait on a busy machine come as one


def test_stop_ends_the_answer_before_it(deployed: Deployed) -> None:
    whole = deployed.ask().choices[0].message.content
    stop = whole[4:6]
    answer = deployed.ask(stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_drawn_answer(deployed: Deployed) -> None:
    def drawn(seed: int) -> str:
        found: str = deployed.ask(seed=seed, temperature=1.5).choices[0].message.content
        return found

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_logprobs_are_of_the_tokens_said(deployed: Deployed) -> None:
    answer = deployed.ask(logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 16
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == answer.message.content


def test_completions_continue_a_text(deployed: Deployed) -> None:
    answer = deployed.client.completions.create(model=NAME, prompt="my phone", max_tokens=5, temperature=0)
    assert answer.usage.completion_tokens == 5
    parts = deployed.client.completions.create(
        model=NAME, prompt="my phone", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text


def test_an_answer_in_a_given_form(deployed: Deployed) -> None:
    schema = {
        "type": "object",
        "properties": {"solved": {"type": "boolean"}},
        "required": ["solved"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "state", "schema": schema}}
    answer = deployed.ask(response_format=form, max_tokens=60)
    assert set(json.loads(answer.choices[0].message.content)) == {"solved"}


def test_a_tool_that_must_be_called_is_called(deployed: Deployed) -> None:
    """By name, whatever the model was taught: the engine holds the arguments to the tool's schema. In streams too."""
    schema = {
        "type": "object",
        "properties": {"solved": {"type": "boolean"}},
        "required": ["solved"],
        "additionalProperties": False,
    }
    tool = {
        "type": "function",
        "function": {"name": "close", "description": "Close it.", "parameters": schema},
    }
    given: dict[str, Any] = {
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "close"}},
        "max_tokens": 120,
    }
    (call,) = deployed.ask(**given).choices[0].message.tool_calls
    assert call.function.name == "close"
    assert set(json.loads(call.function.arguments)) == {"solved"}
    calls = [
        part
        for chunk in deployed.ask(stream=True, **given)
        for choice in chunk.choices
        for part in choice.delta.tool_calls or ()
    ]
    assert {part.function.name for part in calls if part.function.name} == {"close"}
    streamed = "".join(part.function.arguments or "" for part in calls)
    assert json.loads(streamed) == json.loads(call.function.arguments)
    # What the tool said goes back in a turn of its own.
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "closed"},
    ]
    assert deployed.ask(messages=turns, tools=[tool], max_tokens=4).usage.completion_tokens > 0


def test_the_model_has_its_name_its_alias_and_its_version(deployed: Deployed) -> None:
    names = [NAME, f"{NAME}@champion", f"{NAME}@1"]
    assert [model.id for model in deployed.client.models.list()] == names
    said = {deployed.ask(model=name).choices[0].message.content for name in names}
    assert len(said) == 1
    card = deployed.client.models.retrieve(f"{NAME}@champion")
    assert card.id == f"{NAME}@champion"
    assert card.metadata["version"] == 1
    ready = httpx.get(f"{deployed.url}/readyz").json()
    assert (ready["model"], ready["version"], ready["engine"]) == (NAME, 1, "vllm float32 on CPU")


def test_a_model_that_is_not_there_is_a_404_in_openais_form(deployed: Deployed) -> None:
    for ask in (lambda: deployed.ask(model="other"), lambda: deployed.client.models.retrieve("other")):
        with pytest.raises(openai.NotFoundError) as found:
            ask()
        assert found.value.code == "model_not_found"
        assert found.value.param == "model"
        assert f"there are: {NAME}, {NAME}@champion, {NAME}@1" in found.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "256"),
        ({"max_tokens": 300}, "256"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": None, "tools": []}, "messages: input should be a valid list"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": [{"author": {"role": "user"}}, *QUESTION]}, "messages.0.role is missing"),
        ({"stop": ["x"] * 30_000}, "100,000 bytes"),
        ({"stop": ["x"] * 1_000}, "list should have at most"),
        ({"n": 1_000_000}, "n is 1,000,000; ask for at most 128"),
        ({"stream": True, "messages": [{"role": "user", "content": "x" * 400}]}, "256"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, ""),
        ({"n": 0}, ""),
        ({"tools": []}, "tools"),
        ({"logprob_token_ids": [1]}, "logprobs"),
        ({"logit_bias": {"999999": 1}}, "999999"),
        # Nothing that may be said fits the form.
        ({"structured_outputs": {"choice": ["xyz"]}, "allowed_token_ids": [5]}, "structured_outputs leaves nothing"),
        ({"response_format": {"type": "json_object"}, "allowed_token_ids": [5]}, "response_format leaves nothing"),
    ],
)  # fmt: skip
def test_a_clients_mistake_is_a_4xx_that_says_which(
    deployed: Deployed, change: dict[str, Any], says: str
) -> None:
    body = {"model": NAME, "messages": QUESTION, "max_tokens": 4, **change}
    answer = deployed.post("/v1/chat/completions", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert says in f"{error['message']} {error['param']}"
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [None]], ids=repr)
def test_no_value_of_a_wrong_type_is_a_5xx(deployed: Deployed, value: object) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest

    body = {"model": NAME, "messages": QUESTION, "max_tokens": 1}
    for name in ChatCompletionRequest.model_fields:
        answer = deployed.post("/v1/chat/completions", json={**body, name: value})
        assert answer.status_code < 500, (name, answer.text)


def test_a_completion_of_nothing_is_a_400(deployed: Deployed) -> None:
    answer = deployed.post("/v1/completions", json={"model": NAME})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "prompt")


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "\xff"}', b"[]", b"null", b"5", b'"x"'])
def test_a_body_that_is_not_a_request_is_a_400(deployed: Deployed, body: bytes) -> None:
    answer = deployed.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_api_describes_itself(deployed: Deployed) -> None:
    paths = httpx.get(f"{deployed.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/readyz"} <= set(paths)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert "text/event-stream" in paths[path]["post"]["responses"]["200"]["content"]
    assert httpx.get(f"{deployed.url}/docs").status_code == 200


def test_a_row_of_a_dataset_is_asked_and_told_as_the_pipeline_does(deployed: Deployed) -> None:
    row = {"messages": [*QUESTION, {"role": "assistant", "content": "charge it"}]}
    path, body = chat.request(row, NAME)
    reply = deployed.post(path, json={**body, "temperature": 0}).json()
    told = chat.tell(row, reply, [])
    assert f"→ {' '.join(greedy(deployed.ref, body['max_tokens']).split())}" in told
    assert "(the data says: charge it)" in told


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_key_are_counted(deployed: Deployed, stream: bool) -> None:
    _, secret = keys.create("few", [NAME], tokens_per_minute=20)
    few = replace(deployed, key=secret)
    answer = few.ask(stream=stream)
    if stream:
        parts = list(answer)
        # Who did not ask for the usage is not told.
        assert not any(part.usage for part in parts)
        assert all(part.choices for part in parts)
    with pytest.raises(openai.RateLimitError) as refused:
        few.ask()
    assert "20 tokens a minute" in refused.value.message
    assert int(refused.value.response.headers["retry-after"]) > 1
    asked = deployed.ask(stream=True, stream_options={"include_usage": True})
    assert [part.usage.total_tokens for part in asked if part.usage and not part.choices] == [
        deployed.ask().usage.total_tokens
    ]


def test_a_stream_that_is_broken_off_is_charged_and_computed_no_further(deployed: Deployed) -> None:
    def seconds(identity: str, parts: int) -> float:
        """Processor time of the engine for streams of which so many parts are read."""
        before, headers = spent(), {"x-request-id": identity}
        for _ in range(6):
            with deployed.ask(
                stream=True, max_tokens=180, logit_bias={"1": -100}, extra_headers=headers
            ) as stream:
                assert len(list(itertools.islice(stream, parts))) >= min(parts, 20)
        time.sleep(0.5)
        return spent() - before

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in engine_processes())

    def tokens(identity: str) -> int:
        found = [row["tokens"] for row in events.read(NAME) if row["id"] == identity]
        return found[0] if found else 0

    whole, broken = seconds("whole", 1000), seconds("broken", 3)
    assert broken < whole / 2
    deadline = time.monotonic() + 20
    while not (tokens("whole") and tokens("broken")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # The prompt is the same: fewer tokens were said, and those that were are known.
    assert tokens("whole") - 180 + 1 <= tokens("broken") < tokens("whole")


def test_more_than_the_queue_holds_is_503(deployed: Deployed) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: deployed.post("/v1/completions", json=LONG), range(24)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 24
    for answer in refused:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "overloaded"


def test_streams_tell_when_they_began(deployed: Deployed) -> None:
    labels = {"application": NAME, "route": "/v1/chat/completions"}
    name = "ray_whorl_time_to_first_token_seconds_count"
    before = total(scraped(), name, **labels)
    for _ in range(3):
        list(deployed.ask(stream=True))
    deadline = time.monotonic() + 40
    while total(found := scraped(), name, **labels) < before + 3:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert total(found, "ray_whorl_tokens_total", application=NAME) > 0
    assert total(found, "ray_whorl_model_info", application=NAME, model=f"{NAME}@1") == 1


def test_without_a_key_nobody_is_answered(deployed: Deployed) -> None:
    with pytest.raises(openai.AuthenticationError):
        replace(deployed, key="none").ask()
    with pytest.raises(openai.PermissionDeniedError, match=f"is not for {NAME}"):
        replace(deployed, key=key("other")).ask()


@pytest.mark.long
def test_another_champion_is_taken_up_and_its_answers_are_grounded(
    deployed: Deployed, tiny_base: Path
) -> None:
    from serve.deploy import deploy

    before = engine_processes()
    ref = publish_chat(2)
    crown(ref)
    port = deployed.settings.serving.port
    with pytest.raises(RegistryError, match=r"no index shop; make it with python -m jobs\.index"):
        deploy(chat_settings(port=port, knowledge="shop"))
    publish_index(tiny_base, {"Phones": QUESTION[0]["content"], "Cars": "my car does not start"}, "a")
    knowledge = {"index": "shop", "threshold": 0.999, "instructions": "Read.", "unknown": "I do not know."}
    settings = chat_settings(port=port, knowledge={**knowledge, "answer_tokens": 16})
    assert deploy(settings) == deployed.url

    told = {"role": "system", "content": f"Read.\n\n[1] Phones\n{QUESTION[0]['content']}"}
    answer = deployed.ask(model=f"{NAME}@champion")
    assert answer.choices[0].message.content == greedy(ref, 16, told)
    assert answer.choices[0].message.content != greedy(deployed.ref, 16, told)
    (citation,) = answer.model_extra["citations"]
    assert (citation["number"], citation["title"], citation["source"]) == (1, "Phones", "Phones.md")
    parts = list(deployed.ask(stream=True))
    assert [part.model_extra.get("citations") for part in parts] == [*[None] * (len(parts) - 1), [citation]]
    other = [{"role": "user", "content": "xyzzy"}]
    unknown = deployed.ask(messages=other)
    assert unknown.choices[0].message.content == "I do not know."
    assert (unknown.model_extra["citations"], unknown.usage.total_tokens) == ([], 0)
    parts = list(deployed.ask(messages=other, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "I do not know."
    long = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "x"}, *QUESTION]
    with pytest.raises(openai.BadRequestError, match="tokens for passages"):
        deployed.ask(messages=long)

    assert [model.id for model in deployed.client.models.list()][2] == f"{NAME}@2"
    _, alive = psutil.wait_procs(before, timeout=30)
    assert not alive


@pytest.mark.long
def test_a_version_whose_engine_does_not_start_gives_way_to_the_one_before(
    deployed: Deployed, tmp_path: Path
) -> None:
    from serve.deploy import deploy

    before = registry.champion(NAME)
    assert before == ModelRef(NAME, 2)
    model = random_chat(tmp_path, 3)
    model.config.num_hidden_layers += 1  # which the files do not have
    broken = publish(ModelRef(NAME, 3), model, tmp_path)
    tracking.client().create_model_version(NAME, source=broken.uri)
    assert registry.crown(broken, before)
    with pytest.raises(ModelError, match=r"helper did not deploy: .*; helper@2 answers again, as before"):
        deploy(chat_settings(port=deployed.settings.serving.port))
    assert registry.champion(NAME) == before
    assert [model.id for model in deployed.client.models.list()][2] == f"{NAME}@2"
    unknown = deployed.ask(messages=[{"role": "user", "content": "xyzzy"}])
    assert unknown.choices[0].message.content == "I do not know.", "its settings are those of before, too"


@pytest.mark.long
def test_adapters_share_an_engine_and_are_followed_without_a_restart(
    deployed: Deployed, tmp_path: Path
) -> None:
    from serve.deploy import deploy

    random_chat(tmp_path, 7)
    for name in ("goods", "tone"):
        tracking.client().create_registered_model(name)
    refs = [publish_adapter(*of, tmp_path) for of in (("goods", 1), ("goods", 2), ("tone", 1))]
    registry.set_alias(refs[0], registry.CHAMPION)
    engine = {"dtype": "float32", "kv_cache_gib": 0.0625, "max_num_seqs": 8, "max_adapter_rank": 8}
    settings = chat_settings(
        port=deployed.settings.serving.port,
        model="goods@champion",
        chat={**engine, "adapters": ["tone@1"]},
    )
    deploy(settings)

    def says(model: str) -> str:
        answer = deployed.ask(model=model)
        return str(answer.choices[0].message.content)

    assert says("goods") == says("goods@champion") == greedy(refs[0], 16)
    assert says("tone") == says("tone@1") == greedy(refs[2], 16)
    assert says("base") == greedy_of(tmp_path, Path(refs[0].uri.removeprefix("file://")), 16)
    assert len({says("goods"), says("tone"), says("base")}) == 3
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'helper' here .*goods, goods@champion, tone, tone@1, base"
    ):
        says("helper")
    before = {process.pid for process in engine_processes()}
    registry.set_alias(refs[1], registry.CHAMPION)
    deadline = time.monotonic() + 30
    while says("goods") != greedy(refs[1], 16) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert says("goods") == greedy(refs[1], 16)
    assert deployed.ask(model="goods").model == "goods@2"
    assert {process.pid for process in engine_processes()} == before
