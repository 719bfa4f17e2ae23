"""The architectures that come with the program, a file each."""

from evojax_merge.models.families.cohere2 import COHERE2
from evojax_merge.models.families.gemma2 import GEMMA2
from evojax_merge.models.families.gemma3 import GEMMA3
from evojax_merge.models.families.glm4 import GLM4
from evojax_merge.models.families.gpt2 import GPT2
from evojax_merge.models.families.gpt_neox import GPT_NEOX
from evojax_merge.models.families.granite import GRANITE
from evojax_merge.models.families.llama import LLAMA
from evojax_merge.models.families.mistral import MISTRAL
from evojax_merge.models.families.mixtral import MIXTRAL
from evojax_merge.models.families.olmo2 import OLMO2
from evojax_merge.models.families.phi3 import PHI3
from evojax_merge.models.families.qwen2 import QWEN2
from evojax_merge.models.families.qwen2_moe import QWEN2_MOE
from evojax_merge.models.families.qwen3 import QWEN3
from evojax_merge.models.families.qwen3_moe import QWEN3_MOE
from evojax_merge.models.families.qwen_vl import QWEN2_5_VL_TEXT, QWEN2_VL_TEXT, QWEN3_VL_TEXT

FAMILIES = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, GRANITE, COHERE2, GLM4, GPT2, GPT_NEOX, PHI3, MIXTRAL,
    QWEN2_MOE, QWEN3_MOE, QWEN2_VL_TEXT, QWEN2_5_VL_TEXT, QWEN3_VL_TEXT,
)  # fmt: skip
