"""What looks at a run or plans one, from outside: plots, the backward watch, the planner, the commands."""
