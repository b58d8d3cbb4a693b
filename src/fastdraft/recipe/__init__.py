"""The recipe: every setting of a run, a file for each group of sections; `recipe.load_recipe` reads one."""
