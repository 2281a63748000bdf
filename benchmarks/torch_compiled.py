"""PyTorch's model compiled before anything is run, and what to do where that does not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from benchmarks import theirs


class _CompiledOnly(Exception):
    """What was asked for is compiled, and is not to be run yet."""


class Task:
    """The model's forward pass, compiled; eager from the moment that compiling fails.

    torch.compile compiles when it is first called, and then runs. ``prepare`` compiles, and stops
    before it runs: then it is this process' turn on the card. Where a model falls into several
    graphs, the later ones are compiled in its turn.
    """

    def __init__(
        self, model: torch.nn.Module, compiled: bool, *, dynamic: bool, graphs: bool = False
    ) -> None:
        """Compiles nothing yet.

        Args:
          model: of ``theirs.build``.
          compiled: by torch.compile.
          dynamic: one program for pictures of all sizes.
          graphs: as with mode='reduce-overhead', in a CUDA graph.
        """
        self.eager = theirs.forward_of(model, compiled=False)
        self._options = {"triton.cudagraphs": True} if graphs else {}
        self._preparing = False
        # Else the backward pass is compiled when the first step needs it.
        functorch_config.force_non_lazy_backward_lowering = True
        self.run, self.form = None, "eager"
        if compiled:
            self.run = torch.compile(self.eager, dynamic=dynamic, backend=self._backend)
            self.form = "compiled, one program for any size, no CUDA graphs" if dynamic else (
                "compiled, CUDA graph" if graphs else "compiled"
            )  # fmt: skip

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.run is not None:
            try:
                return self.run(pixels)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.run, self.form = None, eager(error)
        return self.eager(pixels)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Compiles for such pictures, in the caller's context (precision, gradients)."""
        self._preparing = True
        try:
            if self.run is not None:
                self.run(pixels)
        except _CompiledOnly:
            pass
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.run, self.form = None, eager(error)
        finally:
            self._preparing = False

    def _backend(self, module: Any, inputs: Any) -> Callable:
        compiled = compile_fx(module, inputs, config_patches=self._options or None)

        def run(*arguments: Any) -> Any:
            if self._preparing:
                raise _CompiledOnly
            return compiled(*arguments)

        return run


def eager(error: Exception) -> str:
    """What a row says when compiling failed."""
    return f"eager ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"


def retried(
    attempt: Callable[[int, bool], Iterator[dict[str, Any]]], images: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """Rows of an attempt: with half as many images where memory runs out, eager if it must be.

    Args:
      attempt: (images, compiled) -> rows; what goes wrong after the first is not tried again.
      images: at first.
      compiled: at first.
    """
    failure: dict[str, str] = {}
    while True:
        rows = attempt(images, compiled)
        try:
            first = next(rows)
        except torch.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2
        except Exception as error:
            if not compiled:
                raise
            compiled, failure = False, {"form": eager(error)}
        else:
            yield {**first, **failure}
            yield from ({**row, **failure} for row in rows)
            return
        del rows
        torch.compiler.reset()
        give_back()


def give_back() -> None:
    """Leaves the card to others until it is this process' turn."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
