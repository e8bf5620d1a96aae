"""Character tokenizers made in code: with BOS or EOS around a text, and chat templates of several manners."""

import string

CHATML = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{%- if thinking is defined and not thinking %}{{- '<think></think>' }}{%- endif %}{%- endif %}"
)
# Gemma's manner: BOS by the template, no system role, turns must alternate.
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Llama 3.2's manner: the clock is read unless a date is given.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{- '<|date|>' + date_string }}" + CHATML
)


def character_tokenizer(*, before: str = "", after: str = "", template: str | None = None):
    """One id per printable character; ``before`` and ``after`` are "<s>" and "</s>" where it puts them itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (before, "$A", after))),
            special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def small_model(tokens: int):
    """A Qwen3 model of one small layer with embeddings for so many tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokens,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            eos_token_id=2,
            pad_token_id=0,
            bos_token_id=1,
        )
    )
