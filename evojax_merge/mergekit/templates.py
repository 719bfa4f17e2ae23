"""Chat templates that a recipe can ask for by name: mergekit's names, and the formats as the models' makers give them.

With `add_generation_prompt` each ends with the beginning of the assistant's turn.
"""

# The format of Qwen and of many fine-tunes.
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{{ message['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The format of Mistral's first instruct models: a system prompt is the beginning of the first instruction.
_MISTRAL = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{{ bos_token }}{% for message in turns %}{% set asked = loop.index0 is even %}"
    "{% if message['role'] != ('user' if asked else 'assistant') %}"
    "{{ raise_exception('the roles user and assistant must alternate, after a system message at most') }}{% endif %}"
    "{% if asked %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_EXAONE = (
    "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
# `user_context` is the input that Alpaca's instructions may have; the last system message stands before all turns.
_ALPACA = (
    "{% set heads = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}"
    "{% for message in messages | selectattr('role', 'equalto', 'system') %}"
    "{% if loop.last %}{{ message['content'] | trim + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% for message in messages if message['role'] in heads %}"
    "{{ '### ' + heads[message['role']] + ':\\n' + message['content'] | trim + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
