element.addEventListener('input', event => {
  props.value = props.stops[+event.target.value];
  trigger('input');
});
watch(['value', 'stops'], () => {
  element.querySelector('input').value = props.stops.indexOf(props.value);
});
