"""Independent references: what the program computes, once more, written from formulas and formats.

They share no code with what they test. Plain float64 NumPy unless a module says otherwise; slow and short."""
