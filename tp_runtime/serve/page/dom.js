// Elements made from data. Text from the server or a model only ever becomes a text node, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a new HTML element with attributes and children; a child is a node or a string, and null is left out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Return a new SVG element; see `el`. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Let Enter submit the form of a text field; Shift and Enter begins a line, and an input method keeps its own Enter. */
export function submitOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
}

/** Show an error in a place, in the server's words. `null` empties the place. */
export function showError(place, error) {
  place.replaceChildren();
  if (error === null) return;
  place.append(el("p", { class: "error" }, el("strong", {}, error.title ?? "The page failed."), " ", error.message));
  if (error.fix) place.lastChild.append(el("span", { class: "fix" }, `Fix: ${error.fix}`));
}
