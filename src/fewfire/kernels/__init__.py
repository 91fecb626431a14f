"""The one door to native code: each kernel validates shapes, dtypes and strides once, picks native or reference, calls it."""

from fewfire.kernels.reference import group_by_expert, top_k

__all__ = ["group_by_expert", "top_k"]
