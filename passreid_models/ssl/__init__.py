"""Part-wise self-distillation (PASS): views, heads, loss and trainer."""
