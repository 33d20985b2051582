// Draws the plots in place of their still images. Without this script the images stay.
const specs = JSON.parse(document.getElementById("plots").textContent);
const options = {
  actions: false,
  ast: true, // expressions are interpreted: the page's policy forbids making code from text
  defaultStyle: false,
  renderer: "svg",
  tooltip: { disableDefaultStyle: true },
};
const drawn = [...document.querySelectorAll("[data-plot]")].map(async (place) => {
  const figure = place.closest("figure");
  figure.classList.add("drawn"); // before drawing: the width is taken from the visible box
  try {
    await vegaEmbed(place, specs[place.dataset.plot], options);
  } catch (error) {
    figure.classList.remove("drawn");
    console.error(error);
  }
});
Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = drawn.length; });

// Paper cannot be clicked: everything folded is printed, then folded again.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details.fold:not([open]):not(.sources):not(.lengthy)")];
  folded.forEach((d) => { d.open = true; });
});
window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
if (matchMedia("(max-width: 70rem)").matches) document.querySelector("nav details").open = false;
