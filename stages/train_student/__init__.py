"""Stage two: train a student on cached targets of the teacher."""

from stages.train_student.run import train_student

__all__ = ["train_student"]
