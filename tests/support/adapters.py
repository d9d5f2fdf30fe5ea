"""The base model of adapters that tests make by hand."""

BASE = {
    "name_or_path": "tests/tiny",
    "architecture": "LlamaForCausalLM",
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "hidden_act": "silu",
}
