"""Policy, teacher and fake score: three roles on one base, or three networks."""
