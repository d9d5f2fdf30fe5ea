"""Trains the demo model from scratch and writes it as a Hugging Face model directory.

    python tools/demo_model.py

A small Llama learns the two tasks of `caprese_serve.demo.problems`, generated on the fly; three quarters of each batch
are math. Conversations are built with the tokenizer's own chat template, so that training matches serving. A killed run
continues from its last checkpoint when it is started again with the same arguments.
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

from caprese_bench.results.settings import options_of
from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import TASKS, Problem, Task, chat, grade, problem, problems

VOCABULARY = 1024
TOKENIZER_PROBLEMS = 5000
BOS, EOS, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
# Every digit is a token, with or without the space before it; so is every other word or run of symbols.
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
# A step's conversations are packed into a fixed shape, so that the training step is compiled only once.
ROWS, ROW_TOKENS = 16, 248
PROMPT_WEIGHT = 0.1  # above 0: predicting a repeated name in a prompt teaches the model to copy
MUON_RATE, ADAMW_RATE = 4e-3, 3e-3
WARMUP = 0.02  # share of the training
CHECKPOINT_SECONDS = 120
NEW_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Options of this script."""

    output: Annotated[Path, typer.Option(help="The model directory to write.")] = MODEL
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 problems.")] = 4000
    minutes: Annotated[float, typer.Option(help="Time limit; the learning rate reaches zero by then.")] = 1440
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the training problems.")] = 0
    checkpoint: Annotated[Path, typer.Option(help="The file from which a killed run continues.")] = Path(
        "out/demo_model.pt"
    )
    log_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations on held-out problems.")] = 250
    test_math: Annotated[int, typer.Option(help="Held-out math problems of the final evaluation.")] = 1000
    test_reading: Annotated[int, typer.Option(help="Held-out reading questions of the final evaluation.")] = 500
    compiled: Annotated[bool, typer.Option(help="Compile the training step.")] = True
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2


@dataclass(frozen=True)
class Batch:
    """Packed token ids, the weight of every token in the loss, and the mask that is added to the attention scores."""

    ids: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on training problems, with the chat template."""
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
    """The token ids of a whole conversation."""
    messages = [*chat(item.prompt), {"role": "assistant", "content": item.response}]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def check_template(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Raises ValueError unless a served prompt, its response and the end of turn have the ids of the conversation."""
    for task in TASKS:
        for item in problems(task, "train", 100, seed):
            prompt = tokenizer.apply_chat_template(chat(item.prompt), add_generation_prompt=True, return_dict=False)
            response = tokenizer.encode(item.response, add_special_tokens=False)
            if encode(tokenizer, item) != [*prompt, *response, tokenizer.eos_token_id]:
                raise ValueError(f"serving splits this conversation into other tokens than training: {item}")


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
        # The rows hold an average step with 5% to spare; conversations that do not fit any more are dropped.
        if end > ROW_TOKENS:
            continue
        filled[row] = end
        ids[row, start:end] = torch.tensor(tokens)
        # The first token has no weight: it would be predicted from the previous conversation.
        weights[row, start + 1 : response] = PROMPT_WEIGHT / (response - start - 1)
        weights[row, response:end] = 1 / (end - response)
        owners[row, start:end] = owner
    visible = (owners[:, :, None] == owners[:, None, :]).tril()
    mask = torch.zeros(ROWS, 1, ROW_TOKENS, ROW_TOKENS).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    return Batch(ids, weights / len(conversations), mask)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The weighted sum of the cross-entropies of the tokens."""
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
    """The factor of the learning rate: a short linear warm-up, then half a cosine to zero."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, count: int) -> float:
    """The share of held-out problems that greedy decoding answers correctly."""
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
    """The state of the training, which a checkpoint saves and restores."""

    def __init__(self, settings: TrainingSettings) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.seed, self.checkpoint = settings, settings.seed, settings.checkpoint
        self.tokenizer = make_tokenizer(self.seed)
        check_template(self.tokenizer, self.seed)
        self.model = make_model(self.tokenizer)
        self.optimizers = make_optimizers(self.model)
        self.step, self.seconds = 0, 0.0
        self.identity = {"steps": settings.steps, "seed": settings.seed}

    def save(self) -> None:
        """Writes the checkpoint in one step: a kill while writing leaves the previous one."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        state: dict[str, Any] = {"identity": self.identity, "step": self.step, "seconds": self.seconds}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def resume(self) -> None:
        """Continues from the checkpoint if there is one. Raises typer.BadParameter if it belongs to another run."""
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
        """The share of the training that is done: of the steps or of the time, whichever is larger."""
        return max(self.step / self.settings.steps, self.seconds / (60 * self.settings.minutes))

    def train(self, console: Console) -> None:
        """Trains to the end, with checkpoints and short evaluations on held-out problems."""
        loss_of = torch.compile(weighted_loss, dynamic=False) if self.settings.compiled else weighted_loss
        saved = time.monotonic()
        with Progress(console=console) as bar:
            line = bar.add_task("training", total=1.0)
            while self.progress() < 1:
                started = time.monotonic()
                factor = rate_factor(max(self.progress(), 1 / self.settings.steps))
                loss = loss_of(self.model, make_batch(self.tokenizer, self.step, self.seed))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
                    optimizer.param_groups[0]["lr"] = rate * factor
                    optimizer.step()
                    optimizer.zero_grad()
                self.step += 1
                if self.step % self.settings.log_every == 0:
                    scores = {task: accuracy(self.model, self.tokenizer, task, 100) for task in TASKS}
                    report = " ".join(f"{task} {scores[task]:.2f}" for task in TASKS)
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


@options_of(TrainingSettings)
def main(settings: TrainingSettings) -> None:
    """Train the demo model and write it to OUTPUT."""
    torch.set_num_threads(settings.threads)
    console = Console()
    trainer = Trainer(settings)
    trainer.resume()
    trainer.train(console)
    write(trainer, settings.output)
    # Evaluates the files that were written.
    model = LlamaForCausalLM.from_pretrained(settings.output, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(settings.output)
    counts: dict[Task, int] = {"math": settings.test_math, "reading": settings.test_reading}
    scores = {task: accuracy(model, tokenizer, task, count) for task, count in counts.items()}
    options = (
        f"--steps {settings.steps} --minutes {settings.minutes:g} --seed {settings.seed} --threads {settings.threads}"
    )
    record = {
        "command": f"python tools/demo_model.py {options}",
        "seed": settings.seed,
        "steps": trainer.step,
        "samples": trainer.step * sum(PER_STEP.values()),
        "seconds": round(trainer.seconds),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": model.num_parameters(),
        "held_out": {task: {"problems": counts[task], "accuracy": scores[task]} for task in counts},
    }
    (settings.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print_json(data=record)


if __name__ == "__main__":
    typer.run(main)
