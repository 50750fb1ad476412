"""The second embedded problem, the demo's: two handwritten digits in colour, placed by the prompt."""
