"""Students for student=merged to be made of."""

from pathlib import Path

from vitkd.models import ViTConfig, save_model


def saved_students(folder: Path, count: int = 2) -> str:
    """The setting `student.runs` that names `count` students of digits in `folder`, with random weights."""
    files = [folder / f"student-{index}.safetensors" for index in range(count)]
    for file in files:
        config = ViTConfig(8, 1, 10, patch_size=4, embed_dim=8, depth=1, num_heads=2, head_dim=4, mlp_dim=8)
        save_model(config.build(), file)
    return f"student.runs=[{','.join(map(str, files))}]"
