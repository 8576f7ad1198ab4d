"""A GGUF file → a model directory that every part of the house reads: safetensors, tokenizer, chat template.

GGUF holds quantised weights in one file, for llama.cpp and its kin. They are read back into bf16, once.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from lib.errors import ModelError


def convert(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file into `folder`. Raises ModelError when transformers cannot read it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    loud = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(**place)
            # Otherwise the weights stay packed, and save_pretrained refuses them.
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
    except Exception as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error
    finally:
        logging.getLogger("transformers").setLevel(loud)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # What ends a turn in the template ends generation, whatever the file's header says.
    ids = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if "<|im_end|>" in (tokenizer.chat_template or "") and ids is not None:
        tokenizer.eos_token = "<|im_end|>"
        model.config.eos_token_id = model.generation_config.eos_token_id = ids
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
