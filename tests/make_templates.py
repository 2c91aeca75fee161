"""Chat templates that behave as those of well-known models do, written anew, with the special tokens that each needs."""

from __future__ import annotations

from typing import NamedTuple

from make_tokenizers import CHATML, INST, UNCLOSED


class Template(NamedTuple):
    """A template, its special tokens, and what a user is told about it (a part of each note)."""

    source: str
    specials: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_NO_SYSTEM = "no system message"
_NO_END = "no control token"
_NO_THOUGHT = "thinking is off"
_IM = ("<|im_start|>", "<|im_end|>")

LIKE = {
    "ChatML": Template(CHATML, _IM),
    "Zephyr": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}"
    ),
    "Llama 2": Template(INST),
    "Llama 3": Template(
        "{{ bos_token }}{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
        "{% set given = messages[0].content if messages[0].role == 'system' else '' %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date }}\n\n{{ given | trim }}<|eot_id|>"
        "{% for m in messages %}{% if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Mistral v0.1": Template(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token + ' ' }}{% endif %}"
        "{% endfor %}",
        notes=(_NO_SYSTEM,),
    ),
    "Mistral v0.3": Template(
        "{{ bos_token }}{% set said = messages %}{% if messages[0].role == 'system' %}{% set who = messages[0].content %}"
        "{% set said = messages[1:] %}{% endif %}{% for m in said %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and who is defined %}{{ who }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        (_NO_SYSTEM,),
    ),
    "Qwen 2.5": Template(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML, _IM
    ),
    "Qwen 3": Template(
        "{% set ns = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.at = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.at %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        _IM,
        (_NO_THOUGHT,),
    ),
    "Qwen 3 without a switch": Template(  # the generation prompt says nothing of thoughts
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        _IM,
        (_NO_THOUGHT,),
    ),
    "Gemma 2": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        (_NO_SYSTEM,),
    ),
    "Gemma 3": Template(
        "{{ bos_token }}{% set said = messages %}{% set who = '' %}{% if messages[0].role == 'system' %}"
        "{% set who = messages[0].content + '\n\n' %}{% set said = messages[1:] %}{% endif %}{% for m in said %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first %}{{ who }}{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "Phi 3": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "Phi 3 without a system role": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        (_NO_SYSTEM,),
    ),
    "Phi 4": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        (*_IM, "<|im_sep|>"),
    ),
    "SmolLM 3": Template(
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}<|im_start|>system\n## Metadata\n\n"
        "Today Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: {{ '/think' if enable_thinking else '/no_think' }}\n\n"
        "## Custom Instructions\n\n{{ messages[0].content if messages[0].role == 'system' else 'Be helpful.' }}<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        _IM,
        (_NO_THOUGHT,),
    ),
    "Falcon instruct": Template(
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}{% endif %}",
        notes=(_NO_END,),
    ),
    "Falcon 3": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "DeepSeek distill": Template(
        "{{ bos_token }}{% set ns = namespace(who='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.who = m.content %}{% endif %}{% endfor %}{{ ns.who }}{% for m in messages %}"
        "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<|Assistant|>{{ m.content.split('</think>') | last }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ("<|User|>", "<|Assistant|>"),
        (_NO_THOUGHT,),
    ),
    "a plain transcript": Template(UNCLOSED, notes=(_NO_END,)),
}
