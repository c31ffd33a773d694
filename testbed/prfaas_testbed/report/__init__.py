"""The page of a run (`page`), its figures, and two runs side by side (`compare`); all from run.json alone."""
