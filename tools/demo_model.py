"""Trains the demo model from scratch and writes it as a Hugging Face model directory.

A small Llama learns the two tasks of ``caprese_serve.demo.problems``, generated on the fly; three quarters of each
batch are math. Conversations are built with the tokenizer's own chat template, so that training matches serving. A
killed run goes on from its last checkpoint when started again with the same arguments.
"""

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import TASKS, Problem, Task, chat, grade, problem, problems

VOCABULARY = 1024
TOKENIZER_PROBLEMS = 5000
BOS, EOS, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
# Every digit is its own token, with the space before it or without; so is every other word or run of symbols.
WORDS = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PER_STEP: dict[Task, int] = {"math": 48, "reading": 16}
# A step's conversations are packed into a fixed shape, so that the compiled step is never recompiled.
ROWS, ROW_TOKENS = 16, 248
# The prompt's weight: predicting a repeated name in a prompt teaches the model to copy.
PROMPT_WEIGHT = 0.1
MUON_RATE, ADAMW_RATE = 4e-3, 3e-3
WARMUP = 0.02
CHECKPOINT_SECONDS = 120
NEW_TOKENS = 96


@dataclass(frozen=True)
class Batch:
    """Packed token ids, the loss's weight of every token, and the attention mask to add to the scores."""

    ids: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from training problems, with the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, EOS, USER, ASSISTANT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    drawn = (item for task in TASKS for item in problems(task, "train", TOKENIZER_PROBLEMS, seed))
    core.train_from_iterator((text for item in drawn for text in (item.prompt, item.response)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 1.2 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The fused attention's backward is slow on CPUs.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def encode(tokenizer: PreTrainedTokenizerFast, item: Problem) -> list[int]:
    """A full conversation's token ids."""
    messages = [*chat(item.prompt), {"role": "assistant", "content": item.response}]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def check_template(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Raises unless a served prompt, its response and the end of turn have the ids of the full conversation."""
    for task in TASKS:
        for item in problems(task, "train", 100, seed):
            prompt = tokenizer.apply_chat_template(chat(item.prompt), add_generation_prompt=True, return_dict=False)
            response = tokenizer.encode(item.response, add_special_tokens=False)
            if encode(tokenizer, item) != [*prompt, *response, tokenizer.eos_token_id]:
                raise ValueError(f"the chat template splits this conversation differently in serving: {item}")


def make_batch(tokenizer: PreTrainedTokenizerFast, step: int, seed: int) -> Batch:
    """The problems of one step; every problem's response has the same total weight."""
    conversations = [
        encode(tokenizer, problem(task, "train", index, seed))
        for task, count in PER_STEP.items()
        for index in range(step * count, (step + 1) * count)
    ]
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    ids = torch.full((ROWS, ROW_TOKENS), tokenizer.pad_token_id)
    weights = torch.zeros(ROWS, ROW_TOKENS)
    owners = torch.zeros(ROWS, ROW_TOKENS, dtype=torch.long)
    filled = [0] * ROWS
    for owner, tokens in enumerate(sorted(conversations, key=len, reverse=True), 1):
        row = min(range(ROWS), key=filled.__getitem__)
        start, response, end = filled[row], filled[row] + tokens.index(assistant) + 1, filled[row] + len(tokens)
        # The rows hold an average step with 5% to spare; what a long one has left over is dropped.
        if end > ROW_TOKENS:
            continue
        filled[row] = end
        ids[row, start:end] = torch.tensor(tokens)
        # The first token has no weight: it would be predicted from the conversation before it.
        weights[row, start + 1 : response] = PROMPT_WEIGHT / (response - start - 1)
        weights[row, response:end] = 1 / (end - response)
        owners[row, start:end] = owner
    visible = (owners[:, :, None] == owners[:, None, :]).tril()
    mask = torch.zeros(ROWS, 1, ROW_TOKENS, ROW_TOKENS).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    return Batch(ids, weights / len(conversations), mask)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The weighted sum of the tokens' cross-entropies."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * batch.weights[:, 1:].flatten()).sum()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(progress: float) -> float:
    """The learning rate's factor: a short warm-up, then half a cosine to zero."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, count: int) -> float:
    """The share of held-out problems answered rightly by greedy decoding."""
    items = list(problems(task, "test", count))
    right = 0
    for start in range(0, count, 100):
        part = items[start : start + 100]
        inputs = tokenizer.apply_chat_template(
            [chat(item.prompt) for item in part],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(grade(response, item.answer) for response, item in zip(responses, part, strict=True))
    return right / count


class Trainer:
    """The training state, which a checkpoint saves and restores."""

    def __init__(self, steps: int, minutes: float, seed: int, checkpoint: Path) -> None:
        torch.manual_seed(seed)
        self.steps, self.minutes, self.seed, self.checkpoint = steps, minutes, seed, checkpoint
        self.tokenizer = make_tokenizer(seed)
        check_template(self.tokenizer, seed)
        self.model = make_model(self.tokenizer)
        self.optimizers = make_optimizers(self.model)
        self.step, self.seconds = 0, 0.0
        self.identity = {"steps": steps, "seed": seed}

    def save(self) -> None:
        """Writes the checkpoint; a kill while writing leaves the last one whole."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        state: dict[str, Any] = {"identity": self.identity, "step": self.step, "seconds": self.seconds}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def resume(self) -> None:
        """Goes on from the checkpoint where there is one of the same run."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["identity"] != self.identity:
            raise typer.BadParameter(f"{self.checkpoint} belongs to another run: {state['identity']}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def progress(self) -> float:
        """The share of the run that is done, by steps or by time, whichever is further."""
        return max(self.step / self.steps, self.seconds / (60 * self.minutes))

    def train(self, log_every: int, console: Console, compiled: bool) -> None:
        """Trains to the end, with checkpoints and now and then a quick look at held-out problems."""
        loss_of = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss
        saved = time.monotonic()
        with Progress(console=console) as bar:
            line = bar.add_task("training", total=1.0)
            while self.progress() < 1:
                started = time.monotonic()
                factor = rate_factor(max(self.progress(), 1 / self.steps))
                loss = loss_of(self.model, make_batch(self.tokenizer, self.step, self.seed))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
                    optimizer.param_groups[0]["lr"] = rate * factor
                    optimizer.step()
                    optimizer.zero_grad()
                self.step += 1
                if self.step % log_every == 0:
                    seen = {task: accuracy(self.model, self.tokenizer, task, 100) for task in TASKS}
                    report = " ".join(f"{task} {seen[task]:.2f}" for task in TASKS)
                    console.log(f"step {self.step} {self.seconds:.0f} s loss {loss.item():.4f} {report}")
                self.seconds += time.monotonic() - started
                bar.update(line, completed=self.progress())
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()


def write(trainer: Trainer, output: Path) -> None:
    """Writes the weights in bfloat16, the tokenizer and the configurations."""
    trainer.model.generation_config.do_sample = False
    trainer.model.to(torch.bfloat16).save_pretrained(output)
    trainer.tokenizer.save_pretrained(output)


def main(
    output: Annotated[Path, typer.Option(help="The model directory to write.")] = MODEL,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 problems.")] = 4000,
    minutes: Annotated[float, typer.Option(help="Time limit; the learning rate reaches zero by then.")] = 1440,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the training problems.")] = 0,
    checkpoint: Annotated[Path, typer.Option(help="Where a killed run goes on from.")] = Path("out/demo_model.pt"),
    log_every: Annotated[int, typer.Option(min=1, help="Steps between looks at held-out problems.")] = 250,
    test_math: Annotated[int, typer.Option(help="Held-out math problems of the final evaluation.")] = 1000,
    test_reading: Annotated[int, typer.Option(help="Held-out reading questions of the final evaluation.")] = 500,
    compiled: Annotated[bool, typer.Option(help="Compile the training step.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the demo model and write it to OUTPUT."""
    torch.set_num_threads(threads)
    console = Console()
    trainer = Trainer(steps, minutes, seed, checkpoint)
    trainer.resume()
    trainer.train(log_every, console, compiled)
    write(trainer, output)
    # What is evaluated is what was written.
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(output)
    counts: dict[Task, int] = {"math": test_math, "reading": test_reading}
    scores = {task: accuracy(model, tokenizer, task, count) for task, count in counts.items()}
    options = f"--steps {steps} --minutes {minutes:g} --seed {seed} --threads {threads}"
    record = {
        "command": f"python tools/demo_model.py {options}",
        "seed": seed,
        "steps": trainer.step,
        "samples": trainer.step * sum(PER_STEP.values()),
        "seconds": round(trainer.seconds),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": model.num_parameters(),
        "held_out": {task: {"problems": counts[task], "accuracy": scores[task]} for task in counts},
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print_json(data=record)


if __name__ == "__main__":
    typer.run(main)
