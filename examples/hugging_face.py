"""Generates with an adapter in a Hugging Face model, without vLLM: `python examples/hugging_face.py [MODEL ADAPTER]`.

Cells as of a notebook: load, generate, apply, generate, compare.
"""

# %% Load
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_distill import apply
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import grade, problems

name, adapter = sys.argv[1:] or (str(MODEL), str(ADAPTERS["griffin"]))
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
asked = list(problems("math", "test", 40))
chats = [[{"role": "user", "content": problem.prompt}] for problem in asked]
batch = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)


def answers() -> list[str]:
    made = model.generate(**batch, max_new_tokens=160, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


# %% Generate: the full model, the plain method, the adapter
texts = {"full model": answers()}
with apply(model, adapter) as sparse:
    print(sparse)
    texts["with the adapter"] = answers()
method = sparse.method
with apply(model, method=method.name, density=method.density, layers=list(method.layers)):
    texts[f"{method.name} alone"] = answers()

# %% Compare
for title, found in texts.items():
    solved = sum(grade(text, problem.answer) for text, problem in zip(found, asked, strict=True))
    print(f"{title}: {solved} of {len(asked)} problems solved")
