"""The chat templates of published models (`templates/`) with the special tokens that a toy tokenizer needs for each."""

from pathlib import Path

from toy_tokenizer import Family

TEMPLATES = Path(__file__).parent / "templates"


def _family(
    name: str, bos: str | None, eos: str, special: str, turn: str = "{0}{eos}", prepends: bool = True
) -> Family:
    template = (TEMPLATES / f"{name}.jinja").read_bytes().decode()
    return Family(template, bos, eos, tuple(special.split()), turn.replace("{eos}", eos), prepends)


_LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|> <|end_header_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn> <end_of_turn>", "{0}<end_of_turn>")
_COHERE = "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>"
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜> <｜Assistant｜>")
_GLM = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"
_GPTOSS = "<|start|> <|end|> <|message|> <|channel|> <|call|>"

# bos, eos, other special tokens, what the model writes for the answer {0}, whether the tokenizer itself writes the bos
FAMILIES = {
    "chatml": _family("chatml", None, "<|im_end|>", "<|im_start|>"),
    "cohere": _family("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", _COHERE),
    "deepseek_v2": _family("deepseek_v2", *_DEEPSEEK),
    "exaone": _family("exaone", None, "[|endofturn|]", "[|system|] [|user|] [|assistant|]"),
    "falcon_h1": _family("falcon_h1", "<|begin_of_text|>", "<|im_end|>", "<|im_start|>"),
    "gemma": _family("gemma", *_GEMMA),
    "gemma3": _family("gemma3", *_GEMMA),
    "glm4moe": _family("glm4moe", None, "<|endoftext|>", _GLM, "\n<think></think>\n{0}{eos}"),
    "gptoss": _family("gptoss", None, "<|return|>", _GPTOSS, "<|channel|>final<|message|>{0}{eos}"),
    "lfm2_2_5": _family("lfm2_2_5", "<|startoftext|>", "<|im_end|>", "<|im_start|>"),
    "llama3": _family("llama3", *_LLAMA3),
    "llama3_1": _family("llama3_1", *_LLAMA3),
    "llama3_2": _family("llama3_2", *_LLAMA3),
    "llama4": _family("llama4", "<|begin_of_text|>", "<|eot|>", "<|header_start|> <|header_end|>"),
    "mistral_v1": _family("mistral_v1", "<s>", "</s>", "", " {0}{eos}"),
    "mistral_v3": _family("mistral_v3", "<s>", "</s>", "[INST] [/INST]"),
    "mistral_v7": _family("mistral_v7", "<s>", "</s>", "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"),
    "phi3": _family("phi3", None, "<|endoftext|>", "<|system|> <|user|> <|assistant|> <|end|>", "{0}<|end|>"),
    "phi_4": _family("phi_4", None, "<|im_end|>", "<|im_start|> <|im_sep|>"),
    "qwen2_5": _family("qwen2_5", None, "<|im_end|>", "<|im_start|>"),
    "qwen3": _family("qwen3", None, "<|im_end|>", "<|im_start|>", "<think>\n\n</think>\n\n{0}{eos}"),
}
# Their prompt begins a thought that their own turns then leave out: no answer can be trained as it is sampled.
REFUSED = {
    "deepseek_r1_distill": _family("deepseek_r1_distill", *_DEEPSEEK),
    "deepseek_v3": _family("deepseek_v3", *_DEEPSEEK),
}
# The template shows an earlier turn otherwise than it was sampled, or ends it with the next one's beginning.
ONE_DOCUMENT_A_TURN = {"glm4moe", "gptoss", "qwen3"}
NO_SYSTEM = {"gemma"}
