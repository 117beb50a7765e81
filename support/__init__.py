"""The first floor: what every script uses and no reader of the method needs. Each file is one concern."""





