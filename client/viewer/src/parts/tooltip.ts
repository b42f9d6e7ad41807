import { element } from './dom'

/** A small box that follows the pointer; what it says the inspector says in full. */
export class Tooltip {
  private readonly box = element('div', { class: 'tooltip', role: 'presentation' })

  constructor() {
    this.box.hidden = true
    document.body.append(this.box)
  }

  show(content: readonly Node[], x: number, y: number): void {
    this.box.replaceChildren(...content)
    this.box.hidden = false
    const { width, height } = this.box.getBoundingClientRect()
    const left = x + 16 + width > window.innerWidth ? x - width - 12 : x + 16
    const top = y + 18 + height > window.innerHeight ? y - height - 12 : y + 18
    this.box.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`
  }

  hide(): void {
    this.box.hidden = true
  }
}
