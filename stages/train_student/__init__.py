"""Stage two: train a student on cached targets of the teacher."""
