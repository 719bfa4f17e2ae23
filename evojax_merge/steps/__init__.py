"""Steps of a search and of an evaluation: the plan, the goal, the choice of the winner, what is written."""
