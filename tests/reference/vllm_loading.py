"""A model folder as vLLM's own loader has it in memory: `python vllm_loading.py FOLDER OUT.safetensors` writes its
parameters, and prints the names of the schemes of its quantised modules. Nothing is computed with them."""

import sys

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform


def main(folder: str, out: str) -> None:
    arguments = EngineArgs(
        model=folder, enforce_eager=True, dtype="bfloat16", max_model_len=32, skip_tokenizer_init=True
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend=current_platform.dist_backend)
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    schemes = {type(module.scheme).__name__ for module in model.modules() if getattr(module, "scheme", None)}
    save_file({name: values.detach().contiguous() for name, values in model.named_parameters()}, out)
    print(*schemes)


if __name__ == "__main__":
    main(*sys.argv[1:])
