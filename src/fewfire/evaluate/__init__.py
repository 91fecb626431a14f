"""How well a model does on the user's own data: perplexity, bits per byte, multiple choice. Text in, figures out."""

from __future__ import annotations

from fewfire.evaluate.evaluation import Evaluation, evaluate, evaluate_documents
from fewfire.evaluate.windows import CONVENTIONS, Convention, Windowing

__all__ = ["CONVENTIONS", "Convention", "Evaluation", "Windowing", "evaluate", "evaluate_documents"]
