"""SERVE.md: how other programs serve an exported model, as commands that are ready to use."""

from collections.abc import Sequence
from dataclasses import dataclass

_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the commands name."""

    name: str
    """The name under which clients ask for the model."""
    stops: Sequence[str]
    dtype: str
    positions: int | None
    """How many tokens the model reads."""
    base: str | None = None
    """The base's name on the hub, for an adapter; None for a whole model."""
    revision: str | None = None
    rank: int = 0
    """vLLM's --max-lora-rank, for an adapter."""


def served_name(run: str) -> str:
    """The name under which clients ask for a run's model, which is also part of file names."""
    return run.replace("/", "-")


def serve_page(served: Served) -> str:
    """The text of SERVE.md. Nothing in it was run."""
    sections = (
        [_vllm_adapter(served), _peft(served), _llama_cpp_adapter(served)]
        if served.base
        else [_vllm(served), _ray_serve(served), _llama_cpp(served), _ollama(served)]
    )
    stops = ", ".join(f"`{stop}`" for stop in served.stops)
    return "\n\n".join(
        [
            f"# Serve {served.name}",
            "Give these commands in this folder. They were not run when it was written.",
            f"An answer ends with {stops}.",
            *sections,
            _asked(served),
        ]
    )


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _length(served: Served) -> str:
    return f" --max-model-len {served.positions}" if served.positions else ""


def _vllm(served: Served) -> str:
    return "## vLLM\n" + _code(
        "bash",
        [f"vllm serve . --served-model-name {served.name} --dtype {served.dtype}{_length(served)}"],
    )


def _vllm_adapter(served: Served) -> str:
    revision = f" --revision {served.revision}" if served.revision else ""
    return "## vLLM\n" + _code(
        "bash",
        [
            f"vllm serve {served.base}{revision} --dtype {served.dtype}{_length(served)} \\",
            f"  --enable-lora --max-lora-rank {served.rank} \\",
            f"  --lora-modules {served.name}=. --tokenizer . --generation-config . \\",
            "  --chat-template chat_template.jinja",
        ],
    )


def _peft(served: Served) -> str:
    revision = f', revision="{served.revision}"' if served.revision else ""
    return "## PEFT\n" + _code(
        "python",
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{served.base}"{revision})',
            'model = PeftModel.from_pretrained(base, ".")',
            'model.generation_config = GenerationConfig.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ],
    )


def _ray_serve(served: Served) -> str:
    length = f"max_model_len={served.positions}, " if served.positions else ""
    return "## Ray Serve LLM\n" + _code(
        "python",
        [
            "from pathlib import Path",
            "",
            "from ray import serve",
            "from ray.serve.llm import LLMConfig, build_openai_app",
            "",
            "config = LLMConfig(",
            "    model_loading_config={",
            f'        "model_id": "{served.name}",',
            '        "model_source": str(Path.cwd()),',
            "    },",
            f'    engine_kwargs=dict({length}dtype="{served.dtype}"),',
            ")",
            'serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)',
        ],
    )


def _llama_cpp(served: Served) -> str:
    kind = {"float16": "f16", "bfloat16": "bf16"}.get(served.dtype, "f32")
    file = f"{served.name}-{kind}.gguf"
    return "## llama.cpp\n" + _code(
        "bash",
        [
            f"python convert_hf_to_gguf.py . --outfile {file} --outtype {kind}",
            f"llama-quantize {file} {served.name}-q4_k_m.gguf Q4_K_M",
            f"llama-server -m {served.name}-q4_k_m.gguf --jinja --port {_PORT}",
        ],
    )


def _llama_cpp_adapter(served: Served) -> str:
    return "## llama.cpp\n" + _code(
        "bash",
        [
            f"python convert_lora_to_gguf.py . --base-model-id {served.base} \\",
            f"  --outfile {served.name}-lora.gguf",
            f"llama-server -m BASE.gguf --lora {served.name}-lora.gguf --jinja --port {_PORT} \\",
            "  --chat-template-file chat_template.jinja",
        ],
    )


def _ollama(served: Served) -> str:
    return "## Ollama\n" + _code(
        "bash", [f"ollama create {served.name} -f Modelfile", f"ollama run {served.name}"]
    )


def _asked(served: Served) -> str:
    asked = f'{{"model": "{served.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return (
        "## Ask it\n"
        + _code(
            "bash",
            [
                f"curl http://localhost:{_PORT}/v1/chat/completions \\",
                "  -H 'Content-Type: application/json' \\",
                f"  -d '{asked}'",
            ],
        )
        + "\n"
    )
