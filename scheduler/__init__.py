"""The scheduler decides: plain synchronous code, frozen values in, frozen values out."""
