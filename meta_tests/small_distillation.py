"""A small mixture with a text to learn: teacher, compressed student, words, and tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch

WORDS = [f"w{i}" for i in range(57)]
VOCABULARY = len(WORDS) + 3
"""Words, ``<pad>``, ``<s>`` and ``</s>``."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_teacher(folder: Path, seed: int = 5, **sizes) -> None:
    """A random Qwen3-MoE whose distributions are far from uniform; its experts nearly share a core."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**{**SIZES, **sizes}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            size = {"embed_tokens": 1.0, "lm_head": 2.0}.get(name.split(".")[-2], 1.5)
            torch.nn.init.normal_(parameter, std=size / math.sqrt(parameter.shape[-1]))
        if "experts" in name:
            parameter.data = related(parameter.data)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def related(experts: torch.Tensor, rank: int = 3) -> torch.Tensor:
    """Experts [experts, d_out, d_in] with the first one's weights, and differences of this rank."""
    count, d_out, d_in = experts.shape
    size = experts.std() * math.sqrt(2 / rank)
    return experts[:1] + size * torch.randn(count, d_out, rank) @ torch.randn(count, rank, d_in)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_student(teacher: Path, folder: Path, rank: int = 2, steps: int = 40) -> None:
    """The teacher compressed so far that its distributions are others."""
    from reference_impl.shared_core.compression import FitOptions, compress_directory

    compress_directory(teacher, folder, FitOptions(rank=rank, num_steps=steps))


def documents(count: int, *, seed: int, shortest: int = 9, longest: int = 24) -> list[list[int]]:
    """Texts of different lengths, of ids of words."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size: torch.randint(low, high, size, generator=generator).tolist()
    lengths = draw(shortest, longest + 1, (count,))
    return [draw(3, VOCABULARY, (length,)) for length in lengths]


def words_of(ids: list[int]) -> str:
    """The text of ids of words."""
    return " ".join(WORDS[i - 3] for i in ids)


TEXTS = documents(40, seed=1)


@torch.no_grad()
def divergence(teacher, student, rows: list[list[int]]) -> float:
    """Mean KL(teacher ‖ student) of a next token, in nats, by transformers' modules one row a time."""
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row])
        q, s = (
            torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
            for model in (teacher.eval(), student.eval())
        )
        total += float((q.exp() * (q - s)).sum())
        count += len(q)
    return total / count


def run_options(models: Path, output: Path, **changes):
    """Options of a run of three steps on the models of a folder."""
    from reference_impl.shared_core.distillation import DistillationOptions

    options = DistillationOptions(
        student=str(models / "student"),
        teacher=str(models / "teacher"),
        data=TEXTS,
        output=str(output),
        steps=3,
        batch_size=4,
        lr=5e-3,
        device="cpu",
        save_steps=1,
        progress=False,
    )
    return with_(options, **changes)


def with_(options, **changes):
    """The options with some changed."""
    return dataclasses.replace(options, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a folder's model, by name."""
    from reference_impl.shared_core.trained_model import load_model

    return {name: p.detach() for name, p in load_model(folder).parameters().items()}


def same_weights(one: Path, other: Path) -> bool:
    """Whether both folders hold the same bits."""
    first, second = weights(one), weights(other)
    same = [torch.equal(weight, second[name]) for name, weight in first.items()]
    return first.keys() == second.keys() and all(same)


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder, of files that are being written, too."""
    return sorted(path.name for path in folder.iterdir())


def make_tasks(folder: Path) -> Path:
    """A task of multiple choice, and one of perplexity, with their data beside them."""
    folder.mkdir()
    texts = [words_of(row) for row in documents(12, seed=71)]
    choices = [[words_of(row) for row in documents(3, seed=i, longest=9)] for i in range(12)]
    asked = [
        {"text": text, "choices": each, "answer": i % 3}
        for i, (text, each) in enumerate(zip(texts, choices))
    ]
    for name, rows in (("choice", asked), ("text", [{"text": text} for text in texts])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "choice.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: choice.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (folder / "text.yaml").write_text(
        "task: local_text\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: text.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n"
        "  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
    )
    return folder
