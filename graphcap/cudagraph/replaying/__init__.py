"""What is left of a capture: the plan, its generated replay, and how outputs leave."""
