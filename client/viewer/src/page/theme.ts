export type Theme = '' | 'light' | 'dark'

/** Light, dark, or ('') as the system has it; the colours themselves are in styles/theme.css. */
export function setTheme(theme: Theme): void {
  const { dataset } = document.documentElement
  if (dataset.theme !== theme) dataset.theme = theme // even the same again is styled again
}

export function isDark(): boolean {
  const chosen = document.documentElement.dataset.theme
  return chosen ? chosen === 'dark' : window.matchMedia('(prefers-color-scheme: dark)').matches
}

const resolved = new Map<string, string>()

/** A colour of the theme as the browser resolves it, for canvas and exported pictures. */
export function resolvedColour(variable: string): string {
  const key = `${variable} ${isDark() ? 'dark' : 'light'}`
  const known = resolved.get(key)
  if (known) return known
  const probe = document.createElement('span')
  probe.style.color = `var(${variable})`
  document.body.append(probe)
  const { color } = getComputedStyle(probe)
  probe.remove()
  resolved.set(key, color)
  return color
}
