"""Prompts of the example: questions about things and tasks of everyday life, each subject in one set only."""

import random
from pathlib import Path

from examples.smollm2.tasks import write_rows

ABOUT_THINGS = ("What is {}? Answer in two sentences.", "How would you explain {} to a child? Answer in two sentences.")
ABOUT_TASKS = ("How do I {}? Answer in two sentences.", "What should I know before I {}? Answer in two sentences.")
SIZES = {"labels": 60, "held_out": 60, "responses": 96, "blind": 210}
THINGS = """
a volcano, photosynthesis, a mortgage, inflation, a vaccine, a black hole, gravity, an atom, a molecule, a glacier, an
earthquake, a hurricane, a desert, a rainforest, a coral reef, the water cycle, a rainbow, lightning, a solar eclipse,
a comet, a galaxy, a telescope, a microscope, a magnet, electricity, a battery, a solar panel, a wind turbine, a dam,
a bridge, a lighthouse, a submarine, a helicopter, a steam engine, a bicycle, a compass, a thermometer, a clock, a
calendar, the alphabet, a dictionary, an encyclopedia, a library, a museum, an orchestra, a violin, a piano, jazz,
ballet, a poem, a novel, a fairy tale, a metaphor, democracy, a parliament, a constitution, an election, a tax, a
budget, a bank, interest on a loan, insurance, a stock market, a patent, a contract, a passport, a virus, bacteria, an
antibiotic, an allergy, a vitamin, protein, sugar, cholesterol, the heart, the liver, a kidney, the brain, a neuron, a
muscle, the skeleton, sleep, a dream, memory, evolution, a fossil, a dinosaur, a mammal, a reptile, an insect, a
spider, a whale, a dolphin, a penguin, an owl, a bee, a butterfly, a mushroom, a cactus, a seed, a forest, compost,
recycling, a computer, an algorithm, the internet, a password, encryption, a robot, a satellite, a camera, a printer,
chess, a mirage, soap, glass, cement, a barometer
"""
TASKS = """
boil an egg, bake bread, cook rice, make pancakes, roast vegetables, brew tea, make lemonade, cook pasta, store
potatoes, freeze fruit, sharpen a knife, clean an oven, wash a sweater, remove a coffee stain, iron a shirt, sew on a
button, fold a map, pack a suitcase, plan a trip, book a hotel, read a map, rent a car, change a tire, wash a car,
ride a bicycle, repair a bicycle, paint a wall, hang a picture, build a shelf, fix a leaking tap, insulate a window,
clean a carpet, tidy a garage, repot a plant, water a garden, plant a tree, grow tomatoes, prune roses, mow a lawn,
start a compost heap, adopt a dog, train a puppy, feed a cat, keep goldfish, build a birdhouse, save money on food,
plan a budget, open a bank account, pay off a debt, ask for a raise, write a short letter, write a resume, prepare for
an interview, give a speech, run a meeting, take notes, study for an exam, stay calm before an exam, learn a new
language, learn to swim, learn to juggle, play the guitar, draw a portrait, take a photograph, write a story, keep a
diary, read more books, join a library, organize a party, choose a gift, wrap a present, carve a pumpkin, decorate a
cake, set a table, host a dinner, make new friends, apologize to a friend, write a thank-you note, fall asleep faster,
wake up early, start jogging, lift weights safely, stretch before a run, run a marathon, climb a hill, go camping,
pitch a tent, light a campfire, catch a fish, paddle a canoe, watch birds, collect stamps, fly a kite, treat a
sunburn, bandage a cut, brush teeth properly, wash hands properly, choose running shoes, buy a used car, sell old
furniture, move to another city, choose a laptop, back up a phone, create a strong password, block spam calls, print a
photo, edit a video, build a website, teach a child to read, babysit a toddler, visit a museum, knit a scarf, solve a
crossword puzzle, donate blood, vote in an election, mail a package
"""


def make_prompts(folder: Path, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """Files of `{"prompt"}` rows by the names of `sizes`, in which no subject is in two files; the same seed gives the
    same bytes."""
    subjects = [(subject, ABOUT_THINGS) for subject in split(THINGS)]
    subjects += [(subject, ABOUT_TASKS) for subject in split(TASKS)]
    random.Random(seed).shuffle(subjects)
    files, begin = {}, 0
    for name, size in sizes.items():
        end = begin + -(-size // 2)
        prompts = [question.format(subject) for subject, asked in subjects[begin:end] for question in asked]
        assert len(prompts) >= size, f"too few subjects for {name}"
        files[name] = write_rows(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts[:size]])
        begin = end
    return files


def split(text: str) -> list[str]:
    """What stands between its commas."""
    return [" ".join(part.split()) for part in text.split(",")]
