"""Attention mechanisms, one folder each: the checked public function, and its plain PyTorch reference."""
