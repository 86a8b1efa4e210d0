"""Prompts in groups, each for a student of its own, as hosts will tell them apart later.

A host routes a prompt to the nearest centroid of the groups' mean embeddings
(`fewstep.heads.routing`), so a grouping is of use only where that finds every prompt's own group.
"""

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import ConfigError, MissingExtraError
from fewstep.heads.routing import nearest, prompt_embedding
from fewstep.trainer.data.prompt_book import PromptBook

Groups = tuple[tuple[int, ...], ...]
BATCH = 256
MAX_ROUNDS = 100


def embedding_groups(book: PromptBook, count: int, *, seed: int = 0) -> Groups:
    """Groups of prompts that mean similar things: k-means of their embeddings.

    Args:
        book: Prompts.
        count: Groups.
        seed: Of k-means' starts.

    Raises:
        ConfigError: Fewer different prompts than groups.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    embeddings = prompt_embeddings(book)
    different = len(embeddings.unique(dim=0))
    if different < count:
        raise ConfigError(
            f"{different} different prompts cannot make {count} groups; use fewer students or more "
            "prompts"
        )
    starts: Any = 4  # sklearn annotates it as the word "auto" alone
    found = KMeans(count, n_init=starts, random_state=seed).fit_predict(embeddings.numpy())
    groups = _grouped(torch.from_numpy(found).long(), count)
    for _ in range(MAX_ROUNDS):  # until the router agrees: its means are float32, k-means' are not
        routed = _grouped(nearest(embeddings, _means(embeddings, groups)), count)
        if routed == groups or any(not group for group in routed):
            break
        groups = routed
    check_routed(book, groups)
    return groups


def label_groups(book: PromptBook, count: int) -> Groups:
    """Groups of whole labels of the prompts file, in their sorted order, as even as they go.

    Raises:
        ConfigError: The prompts have no labels, or fewer than groups.
    """
    labels = sorted(set(book.groups))
    if len(labels) < count:
        raise ConfigError(
            f"the prompts have {len(labels)} different groups, which cannot be shared among "
            f"{count} students; give a group column, or group by embedding"
        )
    owner = {label: i * count // len(labels) for i, label in enumerate(labels)}
    groups = _grouped(torch.tensor([owner[label] for label in book.groups]), count)
    check_routed(book, groups)
    return groups


def check_routed(book: PromptBook, groups: Groups) -> None:
    """Hold a grouping to what hosts will do.

    Raises:
        ConfigError: A prompt's nearest centroid is another group's.
    """
    embeddings = prompt_embeddings(book)
    found = nearest(embeddings, _means(embeddings, groups))
    for number, group in enumerate(groups):
        for row in group:
            if int(found[row]) != number:
                raise ConfigError(
                    f"prompt {book.prompts[row]!r} of group {number} would be routed to group "
                    f"{int(found[row])}, whose prompts have a nearer mean embedding; group by "
                    "embedding instead"
                )


def centroids_of(book: PromptBook, groups: Groups) -> Tensor:
    """Mean embedding of every group, shape (groups, width), float32, on the CPU."""
    return _means(prompt_embeddings(book), groups)


@torch.no_grad()
def prompt_embeddings(book: PromptBook) -> Tensor:
    """One vector per prompt as the router sees it, shape (N, width), float32, on the CPU."""
    found = []
    for rows in torch.arange(len(book.prompts)).split(BATCH):
        condition = book.conditions.take(rows)
        found.append(prompt_embedding(condition.sequence, condition.mask).cpu())
    return torch.cat(found)


def _means(embeddings: Tensor, groups: Groups) -> Tensor:
    return torch.stack([embeddings[list(group)].mean(0) for group in groups])


def _grouped(owner: Tensor, count: int) -> Groups:
    return tuple(tuple((owner == k).nonzero().flatten().tolist()) for k in range(count))
