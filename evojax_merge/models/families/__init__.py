"""The architectures that come with the program, a file each."""

from evojax_merge.models.families.llama import LLAMA
from evojax_merge.models.families.mistral import MISTRAL
from evojax_merge.models.families.qwen2 import QWEN2
from evojax_merge.models.families.qwen3 import QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
