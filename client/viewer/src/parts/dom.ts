/** An element with attributes and children; text becomes text, never markup. */
export function element<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Readonly<Record<string, string>> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[Name] {
  const made = document.createElement(name)
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value)
  made.append(...children)
  return made
}

/** A token's label in a run of text: isolated, so that right-to-left text moves nothing around it. */
export function tokenText(label: string): HTMLElement {
  return element('bdi', { class: 'token' }, label)
}
