from .api import qk_prepare, qkv_prepare

__all__ = ["qk_prepare", "qkv_prepare"]
