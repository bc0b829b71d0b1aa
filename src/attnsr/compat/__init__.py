"""Makes BasicSR 1.4.2 work on current libraries, without touching its files."""
import sys, types

def apply() -> None:
    try:
        import torchvision.transforms.functional_tensor  # noqa
    except ImportError:
        from torchvision.transforms.functional import rgb_to_grayscale
        m = types.ModuleType('torchvision.transforms.functional_tensor')
        m.rgb_to_grayscale = rgb_to_grayscale
        sys.modules[m.__name__] = m
    import basicsr  # noqa
