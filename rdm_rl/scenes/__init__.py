"""The second embedded problem, harder than the demo's: two handwritten digits in colour, placed by the prompt."""
